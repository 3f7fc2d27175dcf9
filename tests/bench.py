"""Time and memory of a model in ComfyUI, and its speedup over a plain loop in the same run.

    python tests/bench.py                                       DynamiCrafter, the demo model
    python tests/bench.py --preset 512 --dtype fp16             full size with random weights: 256, 512, 1024
    python tests/bench.py --family causal_wan                   block-autoregressive Wan, the demo model
    python tests/bench.py --family causal_wan --preset 1.3b --dtype bf16 [--compile]
    python tests/bench.py --count --preset 1024 --dtype fp16    kernels, bytes, FLOP of an evaluation, without a GPU
    python tests/bench.py --family training                     a training step, with and without checkpointing
    python tests/bench.py --family training --objective self_rollout --preset 1.3b    what it needs, counted
    python tests/bench.py --family host                         what ComfyUI's own nodes for speed bring to the demos
    python tests/bench.py --case FOLDER                         a reference case of either family (see parity.py)
    python tests/bench.py --family causal_wan --help            all options of a family

The plain loop runs the same network in the same precision with the same attention; bench_dynamicrafter.py and
bench_causal_wan.py say which optimizations it lacks. The loops alternate; a ratio is the median over the runs. Their
latents must agree. The last line is the figures as JSON. Exits 1 if the latents differ.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent / "workflows" / "runner"), str(TESTS)]

import bench_causal_wan  # noqa: E402
import bench_dynamicrafter  # noqa: E402
import bench_host  # noqa: E402
import bench_training  # noqa: E402
import host  # noqa: E402
from bench_tools import TOLERANCE  # noqa: E402

# A family adds its options and returns all figures of a model as a dict with "latents_agree".
FAMILIES = {"dynamicrafter": bench_dynamicrafter, "causal_wan": bench_causal_wan, "training": bench_training,
            "host": bench_host}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     add_help=False)
    parser.add_argument("--family", choices=FAMILIES, default="dynamicrafter")
    parser.add_argument("--case", type=Path, metavar="FOLDER", help="a reference case")
    parser.add_argument("--dtype", choices=TOLERANCE, default="fp32", help="of the weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where there is a GPU")
    parser.add_argument("--size", metavar="WxH", help="pixels; default: the model's own")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--count", action="store_true", help="count the operations of one evaluation on a GPU (see "
                        "bench_count.py): no time, no GPU needed; not for training")
    parser.add_argument("--comfyui", metavar="PATH", help="an existing ComfyUI folder to run in")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures here as well")
    known, _ = parser.parse_known_args()
    if known.case and "kind" in json.loads((known.case / "case.json").read_text()):
        parser.set_defaults(family="causal_wan")
    FAMILIES[parser.parse_known_args()[0].family].add_arguments(parser)
    parser.add_argument("-h", "--help", action="help", help="show this text and leave")
    options = parser.parse_args()
    if options.case and options.preset:
        parser.error("--case and --preset are two models: give one of them")
    if options.count and not (getattr(options, "preset", None) and hasattr(FAMILIES[options.family], "count")):
        parser.error("--count takes a --preset of dynamicrafter or causal_wan")
    return options


def prepare_host(options):
    """Re-execute in the host's Python; afterwards ComfyUI and the pack are importable."""
    host.check_python()
    host.reexec(options.comfyui)
    import torch
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch finds no GPU here.")
    import importable  # noqa: F401
    from comfy.cli_args import args
    args.cpu = options.device == "cpu" or not torch.cuda.is_available()


def main():
    options = parse_arguments()
    prepare_host(options)
    import torch
    if options.count:
        print(json.dumps(FAMILIES[options.family].count(options), indent=1))
        return 0
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="stillmotion-bench-") as folder:
        figures = FAMILIES[options.family].measure(options, Path(folder))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    return 0 if figures["latents_agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
