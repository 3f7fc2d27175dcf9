"""run.py list and run.py convert: the model files of a ComfyUI, and their conversion, in ComfyUI's Python."""

import argparse
import sys
from pathlib import Path

import commands
import fetch
import host
import inprocess

KINDS = ("checkpoints", "diffusion_models", "loras", "vae", "vae_approx", "text_encoders", "clip_vision")
SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth")


def parser(name, what):
    p = argparse.ArgumentParser(prog=f"run.py {name}", description=what,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--comfyui", metavar="PATH", help="the ComfyUI in this folder (default: as for run.py)")
    return p


def list_models(arguments):
    p = parser("list", "The model files of a ComfyUI: where they are, their size, and what they are by their keys.")
    p.add_argument("--models", type=Path, metavar="FOLDER", help="one more models folder")
    options = p.parse_args(arguments)
    inprocess.import_pack(host.reexec(options.comfyui))
    with commands.ending():
        found = False
        for folder in folders(options):
            for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
                found = True
                print(f"{path}\n  {path.stat().st_size / 1e9:.2f} GB, {what(path)}", flush=True)
        if not found:
            print("no model files in\n  " + "\n  ".join(map(str, folders(options))) + "\nThe demo models come with the "
                  "pack. Download others with: run.py fetch NAME")


def folders(options):
    """The folders that ComfyUI searches for models, and those of --models."""
    import folder_paths

    comfyui = host.find_host(options.comfyui).comfyui
    extra = comfyui / "extra_model_paths.yaml"
    if extra.is_file():
        from utils.extra_config import load_extra_path_config
        load_extra_path_config(str(extra))
    more = [fetch.models_folder(comfyui=options.comfyui), *filter(None, [options.models])]
    return list(dict.fromkeys(Path(place).absolute() for kind in KINDS for place in (
        *folder_paths.get_folder_paths(kind), *(folder / kind for folder in more))))


def what(path):
    from stillmotion.nodes.common.files import read_checkpoint
    from stillmotion.nodes.diagnosis.identify import describe

    try:
        return describe(read_checkpoint(path, values=False))
    except (ValueError, OSError) as error:
        return f"not usable: {error}"


def convert(arguments):
    p = parser("convert", "Write a checkpoint as a .safetensors file without what training left in it. No code in the "
                          "file is run.")
    p.add_argument("source", type=Path, help="a .ckpt, .pt or .safetensors file")
    p.add_argument("target", type=Path, help="the new file; it must end in .safetensors")
    p.add_argument("--dtype", default="keep", choices=("keep", "fp32", "fp16", "bf16"), help="default: keep")
    p.add_argument("--without_encoders", action="store_true",
                   help="leave out DynamiCrafter's text encoder and vision tower; core's loaders then bring them")
    p.add_argument("--weights", default="auto", choices=("auto", "ema", "raw"),
                   help="of an original causal Wan file (default: what its authors use)")
    options = p.parse_args(arguments)
    inprocess.import_pack(host.reexec(options.comfyui), cpu=True)
    from stillmotion.nodes.common.files import read_checkpoint
    from stillmotion.nodes.diagnosis import convert as converter

    try:
        converter.convert(read_checkpoint(options.source), options.target, options.dtype, not options.without_encoders,
                          options.weights)
    except OSError as error:
        sys.exit(f"error: {error.filename or options.source}: {error.strerror or error}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{options.target}\n  {options.target.stat().st_size / 1e9:.2f} GB, {what(options.target)}")
