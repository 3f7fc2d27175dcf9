"""How well the video U-Net demo follows a prompt alone, and how well it predicts what happens next in a clip."""
from dataclasses import replace
from random import Random

from quality_common import by_held_out, only, share

GRAPHS = ("video_unet_text_to_video", "video_unet_predict")
TEXT, PREDICT = GRAPHS
BARS = {"direction_right": 0.90, "prediction_psnr_mean": 24.0, "prediction_gain": 3.0,  # dB above the last given frame
        "prediction_direction_right": 0.90, "prediction_outline_mean": 0.80}
KINDS = ("combination", "phrasing", None, None)  # which part of a prompt is held out from training


def make_cases(data, graphs: dict, seed: int, pairs: int) -> list[dict]:
    """`pairs` prompts for plain objects on plain backgrounds, and as many clips of all kinds whose first frames are
    given (without a prompt, as shipped). A quarter of each are held-out combinations of shape, colour and direction; a
    quarter of the prompts are held-out phrasings."""
    rng, cases = Random(seed), []
    for i in range(pairs):
        held_out = KINDS[i % len(KINDS)]
        form = data.HELD_OUT_FORM if held_out == "phrasing" else rng.randrange(data.HELD_OUT_FORM)
        scene = data.random_object(rng, held_out=held_out == "combination")
        plain = replace(scene, pattern="plain", style="plain")
        case = {"image": i, "held_out": held_out}
        cases.append(case | {"scene": plain, "graph": TEXT, "prompt": plain.caption(form),
                             "seed": rng.randrange(2**31)})
        cases.append(case | {"scene": scene, "graph": PREDICT, "prompt": "", "seed": rng.randrange(2**31)})
    return cases


def truth(case: dict, data):
    return data.draw(case["scene"]).numpy()


def stills(case: dict, truth):
    """The whole clip as one file: the graph extracts the first frames."""
    return [truth] if case["graph"] == PREDICT else []


def fill(graph: dict, case: dict, images: list[str]) -> dict:
    wanted = only(graph, "Stillmotion_VideoUNetConditions")
    graph[wanted["positive"][0]]["inputs"]["text"] = case["prompt"]
    only(graph, "Stillmotion_DDIMSampler")["seed"] = case["seed"]
    if images:
        only(graph, "LoadVideo")["file"], = images
        case["given"] = only(graph, "ImageFromBatch")["length"]
    return graph


def measure(case: dict, frames, truth, data) -> dict:
    """The tracker's measurements of a video, and how close predicted frames are to the true ones."""
    from quality_dynamicrafter import measure_object
    from tracking import psnr, track
    scene = case["scene"]
    row = {"graph": case["graph"], "image": case["image"], "held_out": case["held_out"], "prompt": case["prompt"],
           "frames": len(frames)}
    if case["graph"] == TEXT:
        found = track(frames, data.COLOURS, data.GROUNDS, data.DIRECTIONS)
        return row | {"found": [found.colour, found.direction, found.background],
                      "motion": [round(m, 2) for m in found.motion],
                      "direction_right": found.direction == scene.direction,
                      "colour_right": found.colour == scene.colour,
                      "background_right": found.background == scene.ground}
    given = case["given"]
    errors = [psnr(a, b) for a, b in zip(frames[given:], truth[given:], strict=True)]
    still = [psnr(truth[given - 1], b) for b in truth[given:]]
    return row | measure_object(scene, frames, truth, data) | {
        "predicted": len(errors), "psnr": sum(errors) / len(errors), "psnr_last": errors[-1],
        "still": sum(still) / len(still), "still_last": still[-1]}


def summary(rows: list[dict]) -> dict:
    """The figures that are compared with the thresholds, and those that explain them."""
    text, predicted = ([r for r in rows if r["graph"] == graph] for graph in GRAPHS)

    def mean(name: str) -> float:
        return sum(r[name] for r in predicted) / len(predicted)
    return {
        "pairs": len(text), "frames": text[0]["frames"], "frames_predicted": predicted[0]["predicted"],
        "direction_right": share(text, lambda r: r["direction_right"]),
        "colour_right": share(text, lambda r: r["colour_right"]),
        "background_right": share(text, lambda r: r["background_right"]),
        "all_right": share(text, lambda r: r["direction_right"] and r["colour_right"] and r["background_right"]),
        "motion_pixels_mean": sum(max(map(abs, r["motion"])) for r in text) / len(text),
        "prediction_psnr_mean": mean("psnr"), "prediction_gain": mean("psnr") - mean("still"),
        "prediction_psnr_min": min(r["psnr"] for r in predicted),
        "prediction_psnr_last_frame": mean("psnr_last"), "still_psnr_mean": mean("still"),
        "still_psnr_last_frame": mean("still_last"),
        "prediction_direction_right": share(predicted, lambda r: r["direction_right"]),
        "prediction_outline_mean": mean("outline_mean"), "prediction_outline_last_frame": mean("outline_last"),
        **by_held_out(text, "direction_right")}


def verdict(row: dict) -> tuple[str, bool]:
    if row["graph"] == PREDICT:
        return (f"first frames given, {row['predicted']} predicted: {row['psnr']:.1f} dB   [found {row['found']}, "
                f"outline {row['outline_mean']:.2f}]", row["direction_right"])
    return f"{row['prompt']}   [{' '.join(map(str, row['found']))}]", row["direction_right"] and row["colour_right"]
