"""How well the built-in demo model follows image and prompt, measured on saved files.

    python tests/demo_quality.py [--seed N] [--cases N] [--output FOLDER]

Runs the shipped API graphs on a server with images and prompts that training never saw, decodes the saved MP4s and
tracks the shapes in them. Each image is asked for all four directions; per image one pair is a held-out combination
of shape, colour and direction, and one uses the held-out phrasing. Writes figures.json and contact_sheet.png to the
folder (default: results/demo_quality), prints the figures as JSON in the last line, and exits 1 if a bar is missed.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from random import Random

TESTS = Path(__file__).resolve().parent
PACK = TESTS.parent
sys.path[:0] = [str(PACK / "workflows"), str(TESTS)]

import host  # noqa: E402

MIN_PSNR = 22.0        # dB, of a frame against the picture it should show
MAX_LOOP_GAP = 1.0     # pixels between the shape in a loop's first and last frame: dB alone forgive a small shape
MIDDLE_PIXELS = 6.0    # an interpolated shape passes the middle of its way within this
BARS = {"direction_right": 0.95, "images_with_all_four": 0.85, "colour_kept": 0.95, "background_kept": 0.95,
        "first_frame_kept": 0.95, "interpolate_ends_kept": 0.95, "interpolate_middle_passed": 0.95, "loop_closed": 0.95}


# ---- cases -----------------------------------------------------------------------------------------------

def load_data():
    """The module with the drawing code and the palette; a file of its own, so that no server is needed."""
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location("shapes_data", PACK / "nodes" / "training" / "data.py")
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_fs() -> int:
    """Frames a second that the demo model takes where the graph says 0, from its header."""
    from safetensors import safe_open
    with safe_open(PACK / "nodes" / "demo" / "dynamicrafter_demo.safetensors", "pt") as file:
        config = json.loads(file.metadata()["stillmotion.config"])
    return config["model"]["params"]["unet_config"]["params"]["default_fs"]


def make_cases(data, seed: int, pairs: int, fs: int) -> list[dict]:
    """`pairs` animate cases (four an image) and for every image one interpolate and one loop case."""
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


# ---- running ---------------------------------------------------------------------------------------------

def only(graph: dict, class_type: str) -> dict:
    """Inputs of the graph's one node of this class."""
    found = [node["inputs"] for node in graph.values() if node["class_type"] == class_type]
    if len(found) != 1:
        raise ValueError(f"the graph has {len(found)} nodes {class_type}, not 1")
    return found[0]


def fill(graph: dict, case: dict, images: list[str]) -> dict:
    """A copy of a shipped graph with the case's prompt, seed and picture names; everything else stays as shipped."""
    graph = json.loads(json.dumps(graph))
    wanted = only(graph, "Stillmotion_DynamiCrafterImageToVideo")
    graph[wanted["positive"][0]]["inputs"]["text"] = case["prompt"]
    only(graph, "Stillmotion_DDIMSampler")["seed"] = case["seed"]
    for socket, name in zip(("image", "image2"), images):
        graph[wanted[socket][0]]["inputs"]["image"] = name
    return graph


def read_video(path: Path):
    """All frames of a video file, [T,H,W,3] uint8."""
    import av
    import numpy as np
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def run_case(client, graph: dict, case: dict, data, folder: Path):
    """Frames decoded from the MP4 that the server saved for this case, and the true frames."""
    from PIL import Image
    truth = data.draw_clip(case["clip"]).numpy()
    names = []
    for i, frame in enumerate(truth[:: len(truth) - 1] if case["graph"] == "interpolate" else truth[:1]):
        still = io.BytesIO()
        Image.fromarray(frame).save(still, "PNG")
        names.append(client.upload(still.getvalue(), f"{case['graph']}_{case['image']:03}_{i}.png"))
    outputs = client.run(fill(graph, case, names))
    saved, = [entry for node in outputs.values() for entry in node.get("images", [])
              if entry["filename"].endswith(".mp4")]
    client.download(saved, folder / "result.mp4")
    return read_video(folder / "result.mp4"), truth


# ---- measuring -------------------------------------------------------------------------------------------

def measure(case: dict, frames, truth, data) -> dict:
    """What the tracker says about one result."""
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


def share(rows: list[dict], test) -> float:
    return sum(map(test, rows)) / len(rows)


def summary(rows: list[dict]) -> dict:
    """The figures that are held against the bars, and those that explain them."""
    animate, between, loop = ([r for r in rows if r["graph"] == g] for g in ("animate", "interpolate", "loop"))
    images = {r["image"] for r in animate}
    right = {i for i in images if all(r["direction_right"] for r in animate if r["image"] == i)}
    figures = {
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
        "motion_pixels_mean": sum(max(map(abs, r["motion"])) for r in animate) / len(animate)}
    for kind in ("combination", "phrasing", None):
        name = f"direction_right_held_out_{kind}" if kind else "direction_right_seen"
        figures[name] = share([r for r in animate if r["held_out"] == kind], lambda r: r["direction_right"])
    figures = {k: round(v, 3) for k, v in figures.items()}
    missed = [name for name, bar in BARS.items() if figures[name] < bar]
    return figures | {"missed": missed, "passed": not missed}


def contact_sheet(shown: list[tuple], path: Path, columns: int = 8, scale: int = 2) -> None:
    """Picture of (row, frames) results: one a line, `columns` frames of each, the prompt and verdict above."""
    from PIL import Image, ImageDraw
    side, gap, text = shown[0][1].shape[1] * scale, 4, 18
    sheet = Image.new("RGB", (columns * (side + gap) + gap, len(shown) * (side + text + gap) + gap), (32, 32, 36))
    draw = ImageDraw.Draw(sheet)
    for line, (row, frames) in enumerate(shown):
        top = gap + line * (side + text + gap)
        verdict = (f"{row['graph']}: {row['prompt']}   [found {row['found']}, first frame {row['first_psnr']:.1f} dB, "
                   f"last to first {row['ends_psnr']:.1f} dB]")
        good = row["direction_right"] or row["graph"] == "loop"
        draw.text((gap, top + 2), verdict, fill=(225, 225, 225) if good else (255, 110, 90), font_size=13)
        for column in range(columns):
            frame = frames[column * (len(frames) - 1) // (columns - 1)]
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * (side + gap), top + text))
    sheet.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images, prompts and noise")
    parser.add_argument("--cases", type=int, default=100, help="image + prompt pairs, four an image (default 100)")
    parser.add_argument("--comfyui", metavar="PATH", help="an existing ComfyUI folder to run in")
    parser.add_argument("--server", metavar="URL", help="a running ComfyUI that has the pack")
    parser.add_argument("--output", type=Path, default=PACK / "results" / "demo_quality", metavar="FOLDER")
    options = parser.parse_args()
    if options.cases < 4 or options.cases % 4:
        parser.error(f"--cases {options.cases}: give a multiple of 4 (each image is asked for all four directions)")
    host.check_python()
    comfyui = host.reexec(options.comfyui)
    from client import Client
    from launch import Server
    data = load_data()
    graphs = {name: json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text())
              for name in ("animate", "interpolate", "loop")}
    fs = only(graphs["animate"], "Stillmotion_DynamiCrafterImageToVideo")["fs"] or default_fs()
    cases = make_cases(data, options.seed, options.cases, fs)
    options.output.mkdir(parents=True, exist_ok=True)
    rows, shown, started = [], [], time.monotonic()
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        server = None if options.server else opened.enter_context(
            Server(host.Host(Path(sys.executable), comfyui), device="cpu", threads=1))
        client = Client(options.server or server.url, server)
        for i, case in enumerate(cases):
            frames, truth = run_case(client, graphs[case["graph"]], case, data, folder)
            rows.append(measure(case, frames, truth, data))
            if case["image"] < 3:
                shown.append((rows[-1], frames))
            print(f"\r{i + 1}/{len(cases)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    contact_sheet(shown, options.output / "contact_sheet.png")
    figures = {"seed": options.seed, **summary(rows), "seconds": round(time.monotonic() - started)}
    report = {"figures": figures, "bars": BARS, "cases": rows}
    (options.output / "figures.json").write_text(json.dumps(report, indent=1))
    print(f"figures and contact sheet: {options.output}", file=sys.stderr)
    print(json.dumps(figures))
    return 0 if figures["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
