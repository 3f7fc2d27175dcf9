"""Train a built-in demo model anew, from drawn clips to the checkpoint: hours on a CPU.

    python workflows/train_demo.py [--family dynamicrafter_96|dynamicrafter|causal_wan|video_unet|early|
                                             video_unet_96|causal_wan_96|causal_wan_few]
                                   [--folder FOLDER] [--threads N] [--output FILE]

The state of every stage is kept in the folder: a run that was stopped goes on where it was. The results of the last
three families are not shipped, and no loader offers them under the name demo.
"""

import argparse
import logging
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

host.check_python()

import inprocess  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = ("dynamicrafter", "causal_wan", "video_unet", "early", "dynamicrafter_96",
                "video_unet_96", "causal_wan_96", "causal_wan_few")
    parser.add_argument("--family", choices=families, default="dynamicrafter_96")
    parser.add_argument("--folder", type=Path, default=host.PACK / "results" / "demo_training", help="for the state")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--output", type=Path, help="default: nodes/demo/FAMILY_demo.safetensors")
    options = parser.parse_args()
    inprocess.import_pack(host.reexec())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import torch
    torch.set_num_threads(options.threads)
    from stillmotion.nodes.training.recipes import causal_wan_96, dynamicrafter_96, video_unet_96
    from stillmotion.nodes.training.recipes.causal_wan import make_causal_wan_demo
    from stillmotion.nodes.training.recipes.causal_wan_few import make_few_demo
    from stillmotion.nodes.training.recipes.dynamicrafter_64 import make_demo
    from stillmotion.nodes.training.recipes.video_unet import make_video_unet_demo
    from stillmotion.nodes.training.recipes.video_unet_early import make_early_demo
    make = {"dynamicrafter": make_demo, "causal_wan": make_causal_wan_demo,
            "video_unet": make_video_unet_demo, "early": make_early_demo,
            "dynamicrafter_96": dynamicrafter_96.make_demo,
            "video_unet_96": video_unet_96.make_demo, "causal_wan_96": causal_wan_96.make_demo,
            "causal_wan_few": make_few_demo}[options.family]
    name = "video_unet_early" if options.family == "early" else f"{options.family}_demo"
    make(options.folder, options.output or host.PACK / "nodes" / "demo" / f"{name}.safetensors")


if __name__ == "__main__":
    main()
