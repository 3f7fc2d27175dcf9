"""Train a video model: a new video U-Net, or further a video U-Net, DynamiCrafter or causal Wan.

    python workflows/train.py                                            a small model on drawn moving shapes
    python workflows/train.py --data_dir clips --num_epochs 20           videos/ and captions/ of the same names
    python workflows/train.py --config train.yaml --batch_size 8         the flag wins over the file
    python workflows/train.py --family dynamicrafter --checkpoint model.ckpt --encoders model.ckpt --data_dir clips \\
        --train projector_temporal --num_frames 16 --frame_size 512x320
    python workflows/train.py --family causal_wan --objective self_rollout --checkpoint STUDENT --teacher TEACHER \\
        --encoders ENCODERS --data_dir prompts.txt                       causal Wan on its own videos (Self-Forcing)
    python workflows/train.py --output results/training/model.safetensors --resume
    accelerate launch --multi_gpu --num_processes 2 workflows/train.py --config train.yaml --comfyui PATH

Every setting may stand in the YAML by the name of its flag (examples: workflows/training). The result lies at --output,
and in a folder of the same name beside it settings, state, log, checkpoints, samples and curves. --resume goes on with
the settings of that folder; flags that are given again override them. Stopped (Ctrl+C), it saves first. Runs in
ComfyUI's Python, which is set up on first use; for accelerate and torchrun name one that has all (--comfyui), or
export STILLMOTION_COMFYUI.
"""

import argparse
import logging
import signal
import sys
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

host.check_python()

import inprocess  # noqa: E402


class Stop:
    """Records a stop request, so that the run ends after a complete step."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


CLEAR = "\r\x1b[K"  # to the start of the line, which is emptied


class Lines(logging.StreamHandler):
    """Log lines that take the place of the progress line of a terminal."""

    def emit(self, record):
        if sys.stderr.isatty():
            sys.stderr.write(CLEAR)
        super().emit(record)


def show(progress, stop):
    """Update the progress line on a terminal; stops the run if requested."""
    if sys.stderr.isatty():
        print(f"{CLEAR}{progress.text}", end="", file=sys.stderr, flush=True)
    if stop.asked:
        raise KeyboardInterrupt


def train(settings):
    """Train with these settings; returns the path of the result."""
    import torch
    from stillmotion.nodes.training import load as parts
    from stillmotion.nodes.training.families.inflate import inflate
    from stillmotion.nodes.training.families.registry import load_model, make_family
    from stillmotion.nodes.training.parallel import make_processes
    from stillmotion.nodes.training.run import Training

    processes = make_processes(settings.mixed_precision, parts.choose_device(settings.device))
    stop, result = Stop(), Path(settings.output)
    dataset, model = parts.load_dataset(settings), load_model(settings)
    encoders = parts.load_encoders(settings, parts.works_in_pixels(model, settings), model)
    if settings.objective == "self_rollout":
        from stillmotion.nodes.training.self_rollout.family import SelfRolloutFamily
        from stillmotion.nodes.training.self_rollout.run import SelfRolloutTraining as kind
        family = SelfRolloutFamily(model, *parts.load_scores(settings), encoders, settings)
    else:
        family, kind = make_family(model, encoders, settings, dataset), Training
    if processes.rank == 0:
        print(dataset.summary(), flush=True)
    if settings.init_2d:
        from stillmotion.nodes.common.files import read_checkpoint
        copied, new = inflate(family.net, read_checkpoint(settings.init_2d).tensors)
        print(f"2-D weights: {copied} tensors copied, {new} new")
    torch.manual_seed(settings.seed)
    kind(family, dataset, settings, result, result.with_suffix(""), processes,
             lambda progress: show(progress, stop)).run()
    return result if processes.rank == 0 else None


def main():
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--comfyui", metavar="PATH", help="use the ComfyUI in this folder")
    early.add_argument("--config", type=Path, help="YAML file with settings")
    inprocess.import_pack(host.reexec(early.parse_known_args()[0].comfyui))
    from stillmotion.nodes.training.config import add_flags, make_config
    from stillmotion.nodes.training.resume import saved_settings
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[early])
    add_flags(parser)
    given = vars(parser.parse_args())
    del given["comfyui"]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=[Lines()])
    try:
        result = train(make_config(given.pop("config"), given, saved_settings))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped and saved; go on with --resume", file=sys.stderr)
        sys.exit(130)
    if result:
        print(f"saved {result.resolve()}")


if __name__ == "__main__":
    main()
