"""Data sets for training: drawn, checked, or encoded once for all epochs.

    python workflows/data.py shapes moving --count 500         videos/ and captions/ of drawn moving shapes
    python workflows/data.py check my_clips                    decode every clip, name what is wrong
    python workflows/data.py pack my_clips packed --vae demo   latents in LMDB shards; resumes if stopped

A data set is a folder with videos/ (any video format, or folders of numbered images) and captions/ (.txt of the same
names). Runs in ComfyUI's Python, which is set up on first use; pack needs the package lmdb there.
"""

import argparse
import logging
import sys
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

host.check_python()

import inprocess  # noqa: E402


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--comfyui", metavar="PATH", help="use the ComfyUI in this folder")
    commands = p.add_subparsers(dest="command", required=True, metavar="shapes | check | pack")
    shapes = commands.add_parser("shapes", help="write drawn clips with captions")
    shapes.add_argument("folder", type=Path, help="a new folder")
    shapes.add_argument("--count", type=int, default=500, help="clips (default: 500)")
    shapes.add_argument("--held_out", action="store_true", help="combinations and words that training never sees")
    shapes.add_argument("--seed", type=int, default=0, help="default: 0")
    check = commands.add_parser("check", help="decode every clip and name what is wrong")
    check.add_argument("folder", type=Path, help="the data set")
    pack = commands.add_parser("pack", help="encode clips into LMDB shards")
    pack.add_argument("folder", type=Path, help="the data set")
    pack.add_argument("output", type=Path, help="folder for the shards: new, or of a run that was stopped")
    pack.add_argument("--vae", default="demo",
                      help="a VAE or DynamiCrafter checkpoint, or \"demo, 96x96\" (default: demo)")
    pack.add_argument("--max_samples", type=int, help="only the first clips")
    pack.add_argument("--problems", choices=("skip", "refuse"), default="skip",
                      help="what becomes of bad clips (default: skip, they are named)")
    pack.add_argument("--per_shard", type=int, default=256, help="clips in a shard (default: 256)")
    for command in (shapes, check, pack):
        command.add_argument("--num_frames", type=int, default=16, help="frames of a clip (default: 16)")
        command.add_argument("--frame_size", default="64", help="edge in pixels, or WIDTHxHEIGHT (default: 64)")
    for command in (check, pack):
        command.add_argument("--stride", type=int, default=0,
                             help="take every N-th frame; 0: evenly over the whole clip (default)")
        command.add_argument("--same_size", action="store_true", help="clips of another size than most are bad")
    return p.parse_args(arguments)


def make_shapes(options):
    from stillmotion.nodes.training.data.clips import MovingShapes
    from stillmotion.nodes.training.data.folders import write_shapes
    shapes = MovingShapes(options.count, options.num_frames, options.frame_size, held_out=options.held_out,
                          seed=options.seed)
    write_shapes(shapes, options.folder)
    print(f"{shapes.summary()}: written to {options.folder}")


def open_folder(options, **settings):
    from stillmotion.nodes.training.data.folders import VideoFolder
    return VideoFolder(options.folder, options.num_frames, options.frame_size, stride=options.stride,
                       sizes="same" if options.same_size else "any", **settings)


def check_folder(options):
    logging.disable(logging.WARNING)  # the summary is enough
    try:
        clips = open_folder(options)
        clips.skipped += clips.damaged()
    finally:
        logging.disable(logging.NOTSET)
    print(clips.summary())
    return 1 if clips.skipped else 0


def pack_folder(options):
    from stillmotion.nodes.training.data.shards import LatentShards, pack
    from stillmotion.nodes.training.encoding import Encoders
    clips = open_folder(options, problems=options.problems, max_samples=options.max_samples)
    encode = Encoders(load_vae(options.vae), None, None).latent
    pack(clips, options.output, encode, Path(options.vae).name, per_shard=options.per_shard,
         progress=lambda done, count: print(f"\rencoded {done} of {count}", end="", file=sys.stderr, flush=True))
    print(file=sys.stderr)
    print(LatentShards(options.output).summary())


def load_vae(name):
    """A demo's VAE, the VAE of a DynamiCrafter checkpoint, or a VAE file that core's Load VAE accepts."""
    import comfy.sd
    from stillmotion.nodes.common.demo import DYNAMICRAFTER_DEMOS
    from stillmotion.nodes.common.files import read_checkpoint
    from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter
    found = read_checkpoint(DYNAMICRAFTER_DEMOS.get(name, name))
    if any(key.startswith("model.diffusion_model.") for key in found.tensors):
        vae = dynamicrafter.load(found).vae
        if vae is None:
            raise ValueError(f"{name} holds no VAE (it was pruned); name a whole checkpoint or a VAE file.")
        return vae
    return comfy.sd.VAE(sd=found.tensors)


def main():
    options = parse(sys.argv[1:])
    inprocess.import_pack(host.reexec(options.comfyui))
    from stillmotion.nodes.training.config import parse_size
    try:
        options.frame_size = parse_size(options.frame_size)
        return {"shapes": make_shapes, "check": check_folder, "pack": pack_folder}[options.command](options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(main())
