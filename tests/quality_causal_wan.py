"""How well the causal Wan demo follows image and prompt: one direction for twice its window, and a prompt switch."""
import re
from dataclasses import replace
from random import Random

from quality_common import by_held_out, only, share

GRAPHS = ("causal_image_to_video", "causal_long_video")
WINDOW = 16  # frames per training clip
FS = 18      # the only speed it was trained on
BARS = {"direction_right": 0.90, "shape_kept_at_twice_the_length": 0.90, "new_direction_followed": 0.80}


def start_frames(timeline: str) -> list[str]:
    return re.findall(r"^\s*(\d+)\s*:", timeline, re.MULTILINE)


def make_cases(data, graphs: dict, seed: int, pairs: int) -> list[dict]:
    """`pairs` cases with one direction (four per image), and as many that start that way and then turn."""
    turn = int(start_frames(only(graphs["causal_long_video"], "Stillmotion_PromptTimeline")["prompts"])[1])
    rng, cases = Random(seed), []
    for image in range(-(-pairs // 4)):
        clip = data.random_clip(rng, held_out=True)
        while clip.fs != FS:  # redraw: the margin that keeps a shape inside depends on its speed
            clip = data.random_clip(rng, held_out=True)
        others = [d for d in data.DIRECTIONS if d != clip.direction]
        rng.shuffle(others)
        kinds = [(clip.direction, "combination"), (others[0], "phrasing"), (others[1], None), (others[2], None)]
        for direction, held_out in kinds:
            form = data.HELD_OUT_FORM if held_out == "phrasing" else rng.randrange(data.HELD_OUT_FORM)
            straight = {"image": image, "clip": replace(clip, direction=direction), "held_out": held_out,
                        "seed": rng.randrange(2**31)}
            straight |= {"graph": "causal_image_to_video", "prompt": straight["clip"].caption(form)}
            new = replace(clip, direction=rng.choice([d for d in data.DIRECTIONS if d != direction]))
            seen = "combination" if data.is_held_out(new.shape, new.colour, new.direction) else None
            cases += [straight, straight | {
                "graph": "causal_long_video", "turn": turn, "new": new.direction, "new_prompt": new.caption(form),
                "seed": rng.randrange(2**31), "held_out": "phrasing" if held_out == "phrasing" else seen}]
    return cases


def truth(case: dict, data):
    """The start image; the rest of the video is judged by the tracker alone."""
    return data.draw_clip(case["clip"], 1).numpy()


def stills(case: dict, truth):
    return truth


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
    """The tracker's results before and after the turn, or for the first window and the frames after it."""
    from tracking import psnr, track
    clip, edge = case["clip"], case.get("turn", WINDOW)
    begin, end = (track(part, data.COLOURS, data.BACKGROUNDS, data.DIRECTIONS)
                  for part in (frames[:edge], frames[edge:]))
    return {"graph": case["graph"], "image": case["image"], "held_out": case["held_out"], "frames": len(frames),
            "prompt": case["prompt"], "new_prompt": case.get("new_prompt"), "found": begin.direction,
            "found_later": end.direction, "motion": [round(m, 2) for m in (*begin.motion, *end.motion)],
            "direction_right": begin.direction == clip.direction,
            "later_direction_right": end.direction == case.get("new", clip.direction),
            "later_colour_kept": end.colour == clip.colour, "later_background_kept": end.background == clip.background,
            "first_psnr": psnr(frames[0], truth[0])}


def summary(rows: list[dict]) -> dict:
    """The figures that are compared with the thresholds, and those that explain them."""
    straight, turned = ([r for r in rows if r["graph"] == g] for g in GRAPHS)
    images = {r["image"] for r in straight}
    right = {i for i in images if all(r["direction_right"] for r in straight if r["image"] == i)}
    return {
        "pairs": len(straight), "images": len(images), "frames": straight[0]["frames"],
        "direction_right": share(straight, lambda r: r["direction_right"]),
        "shape_kept_at_twice_the_length": share(straight, lambda r: r["later_colour_kept"]),
        "new_direction_followed": share(turned, lambda r: r["later_direction_right"]),
        "images_with_all_four": len(right) / len(images),
        "direction_right_in_the_second_half": share(straight, lambda r: r["later_direction_right"]),
        "background_kept_at_twice_the_length": share(straight, lambda r: r["later_background_kept"]),
        "shape_kept_after_a_turn": share(turned, lambda r: r["later_colour_kept"]),
        "first_frame_psnr_mean": sum(r["first_psnr"] for r in rows) / len(rows),
        "first_frame_psnr_min": min(r["first_psnr"] for r in rows),
        "motion_pixels_mean": sum(max(map(abs, r["motion"][:2])) for r in straight) / len(straight),
        **by_held_out(straight, "direction_right")}


def verdict(row: dict) -> tuple[str, bool]:
    found = f"found {row['found']}, later {row['found_later']}, first frame {row['first_psnr']:.1f} dB"
    if row["new_prompt"]:
        return f"{row['prompt']}; then {row['new_prompt']}   [{found}]", row["later_direction_right"]
    return f"{row['prompt']}   [{found}]", row["direction_right"] and row["later_colour_kept"]
