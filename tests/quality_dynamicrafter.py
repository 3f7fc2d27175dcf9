"""How well the 96x96 DynamiCrafter demo follows image and prompt: patterned objects, and camera moves over pictures."""
from dataclasses import replace
from random import Random

from quality_common import by_held_out, only, share

GRAPHS = ("animate", "interpolate", "loop")
BARS = {"direction_right": 0.98, "colour_kept": 0.98, "outline_mean": 0.85, "outline_last_frame": 0.80,
        "first_frame_kept": 0.95, "images_with_all_four": 0.90, "camera_right": 0.95, "interpolate_ends_kept": 0.95,
        "interpolate_middle_passed": 0.95, "loop_closed": 0.95}
MIN_PSNR = 28.0         # of a given frame
MAX_HUE_ERROR = 10.0    # degrees, in every frame
FLOW_TOLERANCE = 0.2    # of the requested motion
MIDDLE_PIXELS, LOOP_PIXELS = 6.0, 2.0


def make_cases(data, graphs: dict, seed: int, pairs: int) -> list[dict]:
    """`pairs` animate cases with objects (four per image); for every image one interpolate, one loop and one camera
    case."""
    rng, cases, fs = Random(seed), [], data.FS_RANGE[0]  # the demo's own speed
    for image in range(-(-pairs // 4)):
        scene = data.random_object(rng, held_out=True, fs=fs)
        others = [d for d in data.DIRECTIONS if d != scene.direction]
        rng.shuffle(others)
        kinds = [(scene.direction, "combination"), (others[0], "phrasing"), (others[1], None), (others[2], None)]
        for direction, held_out in kinds:
            form = data.HELD_OUT_FORM if held_out == "phrasing" else rng.randrange(data.HELD_OUT_FORM)
            case = {"image": image, "scene": replace(scene, direction=direction), "held_out": held_out,
                    "seed": rng.randrange(2**31)}
            cases.append(case | {"graph": "animate", "prompt": case["scene"].caption(form)})
        for graph in ("interpolate", "loop"):
            cases.append(cases[-1] | {"graph": graph, "held_out": None})
        camera = replace(data.random_camera(rng), fs=fs, move=list(data.MOVES)[image % len(data.MOVES)])
        form = data.HELD_OUT_FORM if image % 4 == 0 else rng.randrange(data.HELD_OUT_FORM)
        cases.append({"image": image, "scene": camera, "held_out": "phrasing" if image % 4 == 0 else None,
                      "seed": rng.randrange(2**31), "graph": "animate", "prompt": camera.caption(form)})
    return cases


def truth(case: dict, data):
    return data.draw(case["scene"]).numpy()


def stills(case: dict, truth):
    return truth[:: len(truth) - 1] if case["graph"] == "interpolate" else truth[:1]


def fill(graph: dict, case: dict, images: list[str]) -> dict:
    wanted = only(graph, "Stillmotion_DynamiCrafterImageToVideo")
    graph[wanted["positive"][0]]["inputs"]["text"] = case["prompt"]
    only(graph, "Stillmotion_DDIMSampler")["seed"] = case["seed"]
    for socket, name in zip(("image", "image2"), images):
        graph[wanted[socket][0]]["inputs"]["image"] = name
    return graph


def measure(case: dict, frames, truth, data) -> dict:
    """Measurements of one video: of the object, or of the camera."""
    from tracking import psnr
    row = {"graph": case["graph"], "image": case["image"], "prompt": case["prompt"], "held_out": case["held_out"],
           "first_psnr": psnr(frames[0], truth[0]), "last_psnr": psnr(frames[-1], truth[-1]),
           "ends_psnr": psnr(frames[0], frames[-1])}
    return row | (measure_object if hasattr(case["scene"], "shape") else measure_camera)(case["scene"], frames, truth,
                                                                                        data)


def measure_object(scene, frames, truth, data) -> dict:
    import numpy as np
    from outlines import follow
    from tracking import find_direction
    ground = data.draw_ground(scene).clamp(0, 255).round().numpy()
    found = follow(frames, truth, ground)
    seen = not np.isnan(found.path_T2).any()
    direction, motion = find_direction(found.path_T2, data.DIRECTIONS) if seen else (None, (0.0, 0.0))
    hue_error = found.hue_error_T.max() if seen else 180.0  # NaN if an object is too small to have an interior
    off = np.linalg.norm(np.nan_to_num(found.path_T2 - found.true_path_T2, nan=1e3), axis=1)
    away = np.linalg.norm(np.nan_to_num(found.path_T2 - found.path_T2[0], nan=1e3), axis=1)
    middle = len(frames) // 2
    return {"kind": "object", "found": direction, "motion": [round(m, 2) for m in motion],
            "direction_right": direction == scene.direction, "hue_error": float(np.nan_to_num(hue_error, nan=180.0)),
            "outline_mean": float(found.iou_T.mean()), "outline_last": float(found.iou_T[-1]),
            "middle_pixels": float(off[middle - 1:middle + 1].mean()), "excursion": float(away.max()),
            "ends_pixels": float(away[-1])}


def measure_camera(scene, frames, truth, data) -> dict:
    """The flow along the requested motion, and the residual, as fractions of the true flow."""
    import numpy as np
    from outlines import camera_flow
    found, true = camera_flow(frames), camera_flow(truth)
    weight = np.array((1, 1, frames.shape[1] / 4))  # scale in pixels, halfway to the edge
    error = np.linalg.norm((found - true) * weight) / np.linalg.norm(true * weight)
    return {"kind": "camera", "found": scene.move if error <= FLOW_TOLERANCE else None,
            "motion": [round(float(f), 3) for f in found], "flow_error": float(error),
            "direction_right": bool(error <= FLOW_TOLERANCE)}


def summary(rows: list[dict]) -> dict:
    """The figures that are compared with the thresholds, and those that explain them."""
    def mean(of: list[dict], name: str) -> float:
        return sum(r[name] for r in of) / len(of)
    objects, camera = ([r for r in rows if r["kind"] == kind] for kind in ("object", "camera"))
    animate, between, loop = ([r for r in objects if r["graph"] == graph] for graph in GRAPHS)
    images = {r["image"] for r in animate}
    right = {i for i in images if all(r["direction_right"] for r in animate if r["image"] == i)}
    return {
        "pairs": len(animate), "images": len(images),
        "direction_right": share(animate, lambda r: r["direction_right"]),
        "images_with_all_four": len(right) / len(images),
        "colour_kept": share(animate, lambda r: r["hue_error"] < MAX_HUE_ERROR),
        "outline_mean": mean(animate, "outline_mean"), "outline_last_frame": mean(animate, "outline_last"),
        "first_frame_kept": share(animate + camera, lambda r: r["first_psnr"] >= MIN_PSNR),
        "camera_right": share(camera, lambda r: r["direction_right"]),
        "interpolate_ends_kept": share(between, lambda r: min(r["first_psnr"], r["last_psnr"]) >= MIN_PSNR),
        "interpolate_middle_passed": share(between, lambda r: r["middle_pixels"] <= MIDDLE_PIXELS),
        "loop_closed": share(loop, lambda r: r["ends_psnr"] >= MIN_PSNR and r["ends_pixels"] <= LOOP_PIXELS),
        "outline_last_frame_lowest": min(r["outline_last"] for r in animate),
        "first_frame_psnr_mean": mean(animate + camera, "first_psnr"),
        "first_frame_psnr_min": min(r["first_psnr"] for r in animate + camera),
        "camera_flow_error_mean": mean(camera, "flow_error"),
        "hue_error_mean": mean(animate, "hue_error"), "loop_excursion_pixels_mean": mean(loop, "excursion"),
        "motion_pixels_mean": sum(max(map(abs, r["motion"])) for r in animate) / len(animate),
        **by_held_out(animate, "direction_right")}


def verdict(row: dict) -> tuple[str, bool]:
    detail = (f"outline {row['outline_mean']:.2f}, last {row['outline_last']:.2f}" if row["kind"] == "object"
              else f"flow error {row['flow_error']:.0%}")
    return (f"{row['graph']}: {row['prompt']}   [found {row['found']}, first frame {row['first_psnr']:.1f} dB, "
            f"{detail}]", row["direction_right"] or row["graph"] == "loop")
