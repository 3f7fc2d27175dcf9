"""How well the 64x64 DynamiCrafter demo follows image and prompt: animate, interpolate and loop."""
import json
from dataclasses import replace
from random import Random

import quality_dynamicrafter
from quality_common import DEMO, by_held_out, only, share
from quality_dynamicrafter import stills  # noqa: F401  the first frame, or first and last

GRAPHS = ("animate", "interpolate", "loop")
MIN_PSNR = 22.0        # dB, of a frame against its target picture
MAX_LOOP_GAP = 1.0     # pixels between the shape in a loop's first and last frame: PSNR alone ignores small shapes
MIDDLE_PIXELS = 6.0    # an interpolated shape passes within this distance of its path's midpoint
BARS = {"direction_right": 0.95, "images_with_all_four": 0.85, "colour_kept": 0.95, "background_kept": 0.95,
        "first_frame_kept": 0.95, "interpolate_ends_kept": 0.95, "interpolate_middle_passed": 0.95, "loop_closed": 0.95}


def default_fs() -> int:
    """The fps that the demo model uses if the graph says 0, from its header."""
    from safetensors import safe_open
    with safe_open(DEMO / "dynamicrafter_demo.safetensors", "pt") as file:
        config = json.loads(file.metadata()["stillmotion.config"])
    return config["model"]["params"]["unet_config"]["params"]["default_fs"]


def make_cases(data, graphs: dict, seed: int, pairs: int) -> list[dict]:
    """`pairs` animate cases (four per image), and one interpolate and one loop case per image."""
    fs = only(graphs["animate"], "Stillmotion_DynamiCrafterImageToVideo")["fs"] or default_fs()
    rng, cases = Random(seed), []
    for image in range(-(-pairs // 4)):
        clip = replace(data.random_clip(rng, held_out=True), fs=fs)
        others = [d for d in data.DIRECTIONS if d != clip.direction]
        rng.shuffle(others)
        kinds = [(clip.direction, "combination"), (others[0], "phrasing"), (others[1], None), (others[2], None)]
        for direction, held_out in kinds:
            form = data.HELD_OUT_FORM if held_out == "phrasing" else rng.randrange(data.HELD_OUT_FORM)
            case = {"image": image, "clip": replace(clip, direction=direction), "held_out": held_out,
                    "seed": rng.randrange(2**31)}
            cases.append(case | {"graph": "animate", "prompt": case["clip"].caption(form)})
        for graph in ("interpolate", "loop"):
            cases.append(cases[-1] | {"graph": graph, "held_out": None})
    return cases


def truth(case: dict, data):
    return data.draw_clip(case["clip"]).numpy()


def fill(graph: dict, case: dict, images: list[str]) -> dict:
    only(graph, "Stillmotion_LoadDynamiCrafter")["checkpoint"] = "demo"
    only(graph, "Stillmotion_DDIMSampler")["steps"] = 50
    return quality_dynamicrafter.fill(graph, case, images)


def measure(case: dict, frames, truth, data) -> dict:
    """The tracker's measurements of one result."""
    import numpy as np
    from tracking import psnr, track
    found = track(frames, data.COLOURS, data.BACKGROUNDS, data.DIRECTIONS)
    clip = case["clip"]
    row = {"graph": case["graph"], "image": case["image"], "prompt": case["prompt"], "held_out": case["held_out"],
           "found": found.direction, "motion": [round(m, 2) for m in found.motion],
           "direction_right": found.direction == clip.direction, "colour_kept": found.colour == clip.colour,
           "background_kept": found.background == clip.background, "first_psnr": psnr(frames[0], truth[0]),
           "last_psnr": psnr(frames[-1], truth[-1]), "ends_psnr": psnr(frames[0], frames[-1]),
           "ends_pixels": float(np.linalg.norm(np.nan_to_num(found.path_T2[-1] - found.path_T2[0], nan=1e3))),
           "excursion": float(np.nan_to_num(np.linalg.norm(found.path_T2 - found.path_T2[0], axis=1)).max())}
    if case["graph"] == "interpolate":
        step = np.array(data.DIRECTIONS[clip.direction]) * clip.speed * (len(truth) - 1)
        middle = np.array([clip.x, clip.y]) + step / 2
        centre = found.path_T2[len(frames) // 2 - 1: len(frames) // 2 + 1].mean(0)
        row["middle_pixels"] = float(np.linalg.norm(np.nan_to_num(centre, nan=1e3) - middle))
    return row


def summary(rows: list[dict]) -> dict:
    """The figures that are compared with the thresholds, and those that explain them."""
    animate, between, loop = ([r for r in rows if r["graph"] == g] for g in GRAPHS)
    images = {r["image"] for r in animate}
    right = {i for i in images if all(r["direction_right"] for r in animate if r["image"] == i)}
    return {
        "pairs": len(animate), "images": len(images),
        "direction_right": share(animate, lambda r: r["direction_right"]),
        "images_with_all_four": len(right) / len(images),
        "colour_kept": share(animate, lambda r: r["colour_kept"]),
        "background_kept": share(animate, lambda r: r["background_kept"]),
        "first_frame_kept": share(animate, lambda r: r["first_psnr"] >= MIN_PSNR),
        "interpolate_ends_kept": share(between, lambda r: min(r["first_psnr"], r["last_psnr"]) >= MIN_PSNR),
        "interpolate_middle_passed": share(between, lambda r: r["middle_pixels"] <= MIDDLE_PIXELS),
        "loop_closed": share(loop, lambda r: r["ends_psnr"] >= MIN_PSNR and r["ends_pixels"] <= MAX_LOOP_GAP),
        "first_frame_psnr_mean": sum(r["first_psnr"] for r in animate) / len(animate),
        "first_frame_psnr_min": min(r["first_psnr"] for r in animate),
        "interpolate_psnr_min": min(min(r["first_psnr"], r["last_psnr"]) for r in between),
        "interpolate_middle_pixels_max": max(r["middle_pixels"] for r in between),
        "loop_psnr_min": min(r["ends_psnr"] for r in loop),
        "loop_excursion_pixels_mean": sum(r["excursion"] for r in loop) / len(loop),
        "motion_pixels_mean": sum(max(map(abs, r["motion"])) for r in animate) / len(animate),
        **by_held_out(animate, "direction_right")}


def verdict(row: dict) -> tuple[str, bool]:
    return (f"{row['graph']}: {row['prompt']}   [found {row['found']}, first frame {row['first_psnr']:.1f} dB, "
            f"last to first {row['ends_psnr']:.1f} dB]", row["direction_right"] or row["graph"] == "loop")
