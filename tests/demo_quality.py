"""How well a built-in demo model follows image and prompt, measured on saved files.

    python tests/demo_quality.py [--family dynamicrafter|dynamicrafter_64|causal_wan|video_unet] [--seed N]
                                 [--cases N] [--output FOLDER]

Runs the shipped API graphs on a server with images and prompts that training never saw, decodes the saved MP4s and
tracks the shapes in them. Each image is asked for all four directions; per image one pair is a held-out combination
of shape, colour and direction, and one uses the held-out phrasing (video_unet: of every four prompts).
dynamicrafter also asks for camera moves over pictures of hills and a city. Writes
figures.json and contact_sheet.png to the folder (default: results/demo_quality), prints the figures as JSON in the
last line, and exits 1 if a bar is missed.
"""
import argparse
import contextlib
import json
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACK = TESTS.parent
sys.path[:0] = [str(PACK / "workflows" / "runner"), str(TESTS)]

import host  # noqa: E402

FAMILIES = ("dynamicrafter", "dynamicrafter_64", "causal_wan", "video_unet")  # each a module quality_<family>
DRAWN_BY = {"dynamicrafter_64": "shapes"}  # of 64x64; the others are 96x96 and draw scenes
SHOWN_IMAGES = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0], help="whose demo (default dynamicrafter)")
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
    from quality_common import contact_sheet, judge, load_data, load_graphs, run_case
    family = import_module(f"quality_{options.family}")
    data, graphs = load_data(DRAWN_BY.get(options.family, "scenes")), load_graphs(family.GRAPHS)
    cases = family.make_cases(data, graphs, options.seed, options.cases)
    options.output.mkdir(parents=True, exist_ok=True)
    rows, shown, started = [], [], time.monotonic()
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        server = None if options.server else opened.enter_context(
            Server(host.Host(Path(sys.executable), comfyui), device="cpu", threads=1))
        client = Client(options.server or server.url, server)
        for i, case in enumerate(cases):
            frames, truth = run_case(client, family, graphs[case["graph"]], case, data, folder)
            rows.append(family.measure(case, frames, truth, data))
            if case["image"] < SHOWN_IMAGES:
                shown.append((rows[-1], frames))
            print(f"\r{i + 1}/{len(cases)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    contact_sheet(shown, family.verdict, options.output / "contact_sheet.png")
    figures = {"family": options.family, "seed": options.seed, **judge(family.summary(rows), family.BARS),
               "seconds": round(time.monotonic() - started)}
    report = {"figures": figures, "bars": family.BARS, "cases": rows}
    (options.output / "figures.json").write_text(json.dumps(report, indent=1))
    print(f"figures and contact sheet: {options.output}", file=sys.stderr)
    print(json.dumps(figures))
    return 0 if figures["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
