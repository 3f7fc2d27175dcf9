"""Train a built-in demo model anew, from drawn clips to the checkpoint: hours on a CPU, minutes on a GPU.

    python workflows/train_demo.py [--family dynamicrafter_96|decoder_96|dynamicrafter|causal_wan|video_unet|early|
                                             causal_wan_few]
                                   [--steps N] [--batch N] [--files N] [--folder FOLDER] [--threads N] [--output FILE]

The state of every stage is kept in the folder: a run that was stopped goes on where it was. dynamicrafter and early
train on the CPU, the others on the GPU if there is one. decoder_96 trains the decoder of the 96x96 demo alone. The
result of the last family is not shipped, and no loader offers it under the name demo.
"""

import argparse
import logging
from inspect import signature
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

host.check_python()

import inprocess  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = ("dynamicrafter_96", "decoder_96", "dynamicrafter", "causal_wan", "video_unet", "early",
                "causal_wan_few")
    parser.add_argument("--family", choices=families, default="dynamicrafter_96")
    for name, meaning in (("steps", "of the last stage; for dynamicrafter_96, decoder_96, causal_wan, video_unet"),
                          ("batch", "clips or images a step; for the same"),
                          ("files", "files of 400 drawn clips; for dynamicrafter_96 and video_unet")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default: the recipe's)")
    parser.add_argument("--folder", type=Path, default=host.PACK / "results" / "demo_training", help="for the state")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--output", type=Path, help="default: the demo's file in nodes/demo")
    options = parser.parse_args()
    inprocess.import_pack(host.reexec())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import torch
    torch.set_num_threads(options.threads)
    from stillmotion.nodes.training.recipes import causal_wan, dynamicrafter_96, video_unet_96
    from stillmotion.nodes.training.recipes.causal_wan_few import make_few_demo
    from stillmotion.nodes.training.recipes.dynamicrafter_64 import make_demo
    from stillmotion.nodes.training.recipes.video_unet_early import make_early_demo
    make = {"dynamicrafter": make_demo, "causal_wan": causal_wan.make_demo,
            "video_unet": video_unet_96.make_demo, "early": make_early_demo,
            "dynamicrafter_96": dynamicrafter_96.make_demo, "decoder_96": dynamicrafter_96.make_decoder,
            "causal_wan_few": make_few_demo}[options.family]
    name = {"early": "video_unet_early", "decoder_96": "dynamicrafter_96_demo"}.get(
        options.family, f"{options.family}_demo")
    given = {name: value for name in ("steps", "batch", "files") if (value := getattr(options, name)) is not None}
    for option, value in given.items():
        if value < 1:
            parser.error(f"--{option} {value}: give 1 or more")
    unknown = given.keys() - signature(make).parameters
    if unknown:
        parser.error(f"--{' and --'.join(sorted(unknown))}: not a setting of {options.family}, whose recipe is fixed "
                     "there")
    make(options.folder, options.output or host.PACK / "nodes" / "demo" / f"{name}.safetensors", **given)


if __name__ == "__main__":
    main()
