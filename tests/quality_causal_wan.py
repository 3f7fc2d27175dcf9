"""How well the causal Wan demo follows image and prompt: one direction for twice its window, and a prompt switch."""
import re
from dataclasses import replace
from random import Random

from quality_common import by_held_out, only, share

GRAPHS = ("causal_image_to_video", "causal_long_video")
WINDOW = 16   # frames of the window, and of half a video
FS = 30       # the only speed it was trained on
BARS = {"direction_right": 0.98, "colour_kept": 0.98, "first_frame_kept": 0.95, "outline_mean": 0.85,
        "outline_at_twice_the_length": 0.75, "new_direction_followed": 0.80}
MIN_PSNR = 28.0         # of the start image
MAX_HUE_ERROR = 10.0    # degrees, in every frame


def start_frames(timeline: str) -> list[str]:
    return re.findall(r"^\s*(\d+)\s*:", timeline, re.MULTILINE)


def make_cases(data, graphs: dict, seed: int, pairs: int) -> list[dict]:
    """`pairs` cases with one direction (four per image), and as many that start that way and then turn."""
    turn = int(start_frames(only(graphs["causal_long_video"], "Stillmotion_PromptTimeline")["prompts"])[1])
    rng, cases = Random(seed), []
    for image in range(-(-pairs // 4)):
        scene = data.random_object(rng, held_out=True, frames=2 * WINDOW, fs=FS)
        others = [d for d in data.DIRECTIONS if d != scene.direction]
        rng.shuffle(others)
        kinds = [(scene.direction, "combination"), (others[0], "phrasing"), (others[1], None), (others[2], None)]
        for direction, held_out in kinds:
            form = data.HELD_OUT_FORM if held_out == "phrasing" else rng.randrange(data.HELD_OUT_FORM)
            straight = {"image": image, "scene": replace(scene, direction=direction), "held_out": held_out,
                        "seed": rng.randrange(2**31)}
            straight |= {"graph": "causal_image_to_video", "prompt": straight["scene"].caption(form)}
            new = replace(scene, direction=rng.choice([d for d in data.DIRECTIONS if d != direction]))
            seen = "combination" if data.is_held_out(new.shape, new.colour, new.direction) else None
            cases += [straight, straight | {
                "graph": "causal_long_video", "turn": turn, "new": new.direction, "new_prompt": new.caption(form),
                "seed": rng.randrange(2**31), "held_out": "phrasing" if held_out == "phrasing" else seen}]
    return cases


def truth(case: dict, data):
    """The clip that goes straight on: outlines and hues are compared at the tracked place, wherever that is."""
    return data.draw(case["scene"], 2 * WINDOW).numpy()


def stills(case: dict, truth):
    return truth[:1]


def fill(graph: dict, case: dict, images: list[str]) -> dict:
    wanted = only(graph, "Stillmotion_CausalWanImageToVideo")
    graph[wanted["positive"][0]]["inputs"]["text"] = case["prompt"]
    graph[wanted["image"][0]]["inputs"]["image"], = images
    only(graph, "Stillmotion_BlockAutoregressiveSampler")["seed"] = case["seed"]
    if "turn" in case:
        timeline = only(graph, "Stillmotion_PromptTimeline")
        starts = start_frames(timeline["prompts"])
        lines = zip(starts, (case["prompt"], case["new_prompt"]), strict=True)
        timeline["prompts"] = "\n".join(f"{start}: {prompt}" for start, prompt in lines)
    return graph


def measure(case: dict, frames, truth, data) -> dict:
    """Directions before and after the turn, or in the first window and after it; outline and hue of the object."""
    import numpy as np
    from outlines import follow
    from tracking import find_direction, psnr
    scene, edge = case["scene"], case.get("turn", WINDOW)
    found = follow(frames, truth, data.draw_ground(scene).clamp(0, 255).round().numpy())

    def direction(path_T2):
        return (None, (0.0, 0.0)) if np.isnan(path_T2).any() else find_direction(path_T2, data.DIRECTIONS)

    (first, moved), (later, moved_later) = direction(found.path_T2[:edge]), direction(found.path_T2[edge:])
    hue_error_T = np.nan_to_num(found.hue_error_T, nan=180.0)
    return {"graph": case["graph"], "image": case["image"], "held_out": case["held_out"], "frames": len(frames),
            "prompt": case["prompt"], "new_prompt": case.get("new_prompt"), "found": first, "found_later": later,
            "motion": [round(m, 2) for m in (*moved, *moved_later)], "direction_right": first == scene.direction,
            "later_direction_right": later == case.get("new", scene.direction),
            "hue_error": float(hue_error_T[:WINDOW].max()), "hue_error_later": float(hue_error_T.max()),
            "outline_mean": float(found.iou_T.mean()), "outline_last": float(found.iou_T[-1]),
            "first_psnr": psnr(frames[0], truth[0])}


def summary(rows: list[dict]) -> dict:
    """The figures that are compared with the thresholds, and those that explain them."""
    def mean(of: list[dict], name: str) -> float:
        return sum(r[name] for r in of) / len(of)
    straight, turned = ([r for r in rows if r["graph"] == g] for g in GRAPHS)
    images = {r["image"] for r in straight}
    right = {i for i in images if all(r["direction_right"] for r in straight if r["image"] == i)}
    return {
        "pairs": len(straight), "images": len(images), "frames": straight[0]["frames"],
        "direction_right": share(straight, lambda r: r["direction_right"]),
        "colour_kept": share(straight, lambda r: r["hue_error"] < MAX_HUE_ERROR),
        "first_frame_kept": share(rows, lambda r: r["first_psnr"] >= MIN_PSNR),
        "outline_mean": mean(straight, "outline_mean"),
        "outline_at_twice_the_length": mean(straight, "outline_last"),
        "new_direction_followed": share(turned, lambda r: r["later_direction_right"]),
        "images_with_all_four": len(right) / len(images),
        "direction_right_in_the_second_half": share(straight, lambda r: r["later_direction_right"]),
        "colour_kept_at_twice_the_length": share(straight, lambda r: r["hue_error_later"] < MAX_HUE_ERROR),
        "hue_error_mean": mean(straight, "hue_error"), "outline_after_a_turn": mean(turned, "outline_last"),
        "outline_last_frame_lowest": min(r["outline_last"] for r in straight),
        "first_frame_psnr_mean": mean(rows, "first_psnr"), "first_frame_psnr_min": min(r["first_psnr"] for r in rows),
        "motion_pixels_mean": sum(max(map(abs, r["motion"][:2])) for r in straight) / len(straight),
        **by_held_out(straight, "direction_right")}


def verdict(row: dict) -> tuple[str, bool]:
    found = (f"found {row['found']}, later {row['found_later']}, outline {row['outline_mean']:.2f}, last "
             f"{row['outline_last']:.2f}, first frame {row['first_psnr']:.1f} dB")
    prompt = f"{row['prompt']}; then {row['new_prompt']}" if row["new_prompt"] else row["prompt"]
    return f"{prompt}   [{found}]", row["direction_right"] and row["later_direction_right"]
