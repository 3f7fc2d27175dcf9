"""Turn a still image and a prompt into a video, with a ComfyUI that is set up on first use.

    python workflows/run.py                                        the built-in demo model on an example image
    python workflows/run.py 512 --image cat.png --prompt "a cat walks"
    python workflows/run.py 1024 42 cuda:1 --prompt_dir photos     every image with a same-named .txt, seed 42

Presets: demo (96x96), 256 (256x256, frame stride 3), 512 (512x320, fs 24), 1024 (1024x576, fs 10); the real ones need
a checkpoint, and the script says which and where. The preset's ComfyUI is a private one unless the pack lies in the
custom_nodes folder of another, or --comfyui or --server names one; nothing is installed into those. A video that is
there already stays, and the new one gets a number, unless --overwrite is given.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

host.check_python()

import batch  # noqa: E402
import commands  # noqa: E402
from inprocess import common  # noqa: E402
from progress import Progress  # noqa: E402

EXAMPLE = host.WORKFLOWS / "examples" / "stillmotion_star.png"  # its prompt is in the workflow
SIDE = 8  # pixels: sides are multiples of it
# `run.py NAME ...` calls main(arguments after the name), or the function named after a colon, of a module in runner/.
SUBCOMMANDS = {  # name: (module, what it does)
    "batch": ("batch", "run an API graph over a table or a folder of pictures"),
    "status": ("batch:status", "how far a batch is"),
    "resume": ("batch:resume", "go on with a batch"),
    "retry": ("batch:retry", "try the failed jobs of a batch again"),
    "live": ("live", "make a video block by block, and change its prompt meanwhile"),
    "fetch": ("fetch", "download a known model"),
    "list": ("models:list_models", "which models are there, where, and what they are"),
    "convert": ("models:convert", "a checkpoint as a pruned .safetensors file"),
}
DEFAULTS = {"steps": 50, "eta": 1.0, "frames": 16, "fps": 8.0}  # of the presets 256, 512, 1024


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog=subcommands())
    p.add_argument("preset", nargs="?", default="demo", metavar="{" + ",".join(commands.PRESETS) + "}",
                   help="default: demo")
    p.add_argument("seed_and_device", nargs="*", metavar="[SEED] [DEVICE]", help="short for --seed and --device")
    p.add_argument("--image", "--image_path", type=Path, help="the still image (default: an example)")
    p.add_argument("--prompt", "--prompt_text", help="what happens in the video")
    p.add_argument("--negative_prompt", help="what to keep out of the video")
    p.add_argument("--prompt_dir", type=Path,
                   help="animate every image in this folder that has a same-named .txt, or a line in prompts.txt")
    p.add_argument("--filter", default="", metavar="PATTERN", help="of --prompt_dir only the images so named (cat*)")
    p.add_argument("--limit", type=int, help="of --prompt_dir only the first images, in natural order")
    p.add_argument("--seed", type=int, help="default: 123")
    p.add_argument("--steps", "--num_inference_steps", type=int,
                   help="sampling steps, 1 to 1000 (default: 50, demo: 20)")
    p.add_argument("--guidance_scale", type=float, help="strength of the prompt (default: 7.5, demo: 1.5)")
    p.add_argument("--eta", type=float, help="0 is deterministic, 1 adds fresh noise at each step (default: 1)")
    p.add_argument("--frames", "--video_length", type=int, help="length in frames (default: 16)")
    p.add_argument("--fps", type=float, help="frames per second of the saved file (default: 8)")
    p.add_argument("--frame_stride", type=int, help="motion: a stride for 256, frames per second for 512 and 1024")
    p.add_argument("--width", type=int, help="default: the preset's")
    p.add_argument("--height", type=int, help="default: the preset's")
    p.add_argument("--batch_size", type=int, default=1, help="videos for each image, from different noise (default: 1)")
    p.add_argument("--checkpoint", help="a checkpoint file, or a name in ComfyUI's models/checkpoints")
    p.add_argument("--output", "--output_dir", type=Path, help="folder for the videos (default: results)")
    batch.add_flags(p)
    options = p.parse_intermixed_args(arguments)
    for value in options.seed_and_device[:2]:
        name = "device" if value.startswith(("cuda", "cpu", "auto")) or options.seed is not None else "seed"
        if getattr(options, name) is not None or (name == "seed" and not value.isdigit()):
            p.error(f"unexpected {value!r}: after the preset come a seed (0 or more) and a device (cpu, cuda, cuda:N)")
        setattr(options, name, int(value) if name == "seed" else value)
    if len(options.seed_and_device) > 2:
        p.error(f"unexpected {options.seed_and_device[2]!r}: at most a preset, a seed and a device")
    options.seed = 123 if options.seed is None else options.seed
    problem = check(options)
    if problem:
        p.error(problem)
    return options


def subcommands():
    rows = [f"  run.py {name:10} {what}" for name, (_, what) in SUBCOMMANDS.items()]
    return "\n".join(["other commands (each has its own --help):", *rows]) if rows else None


def check(options):
    """What is wrong with the options, or None. Checked before anything is set up or started."""
    if options.preset not in commands.PRESETS:
        picture = f"; a picture is given as --image {options.preset}" if Path(options.preset).exists() else ""
        return (f"{options.preset!r} is neither a preset ({', '.join(commands.PRESETS)}) nor a command "
                f"({', '.join(SUBCOMMANDS)}){picture}")
    if options.prompt_dir and (options.image or options.prompt):
        return "--prompt_dir brings its own images and prompts: leave out --image and --prompt"
    if not options.prompt_dir and (options.filter or options.limit):
        return "--filter and --limit choose among the images of --prompt_dir"
    if options.prompt_dir and not options.prompt_dir.is_dir():
        return f"--prompt_dir: there is no folder {options.prompt_dir}"
    if options.image and not options.image.is_file():
        return f"--image: there is no file {options.image}"
    if options.image and options.prompt is None:
        return "--image needs a --prompt that says what happens"
    alone = [name for name in batch.FLAGS if batch.given(getattr(options, name))]
    if alone and not options.prompt_dir:
        return f"--{alone[0]} belongs to a batch: give --prompt_dir, or use `run.py batch`"
    uneven = [name for name in ("width", "height") if (getattr(options, name) or 0) % SIDE]
    if uneven:
        side = getattr(options, uneven[0])
        return f"--{uneven[0]} is {side}: it must be a multiple of {SIDE}, such as {max(SIDE, side // SIDE * SIDE)}"
    positive = ("steps", "frames", "batch_size", "fps", "width", "height", "limit")
    return batch.problem(options) or commands.check(options, positive)


def jobs(options):
    """[(image, prompt, path of the video without extension)]; reports other files in a folder. Raises HostError."""
    pictures, short_name = common("pictures"), common("saving").short_name
    if not options.prompt_dir:
        image = options.image or EXAMPLE
        name = f"{short_name(image.stem)}_{options.preset}_seed{options.seed}"
        return [(image, options.prompt, (options.output or Path("results")) / name)]
    folder = options.output or Path("results") / f"dynamicrafter_pipeline_{options.preset}_seed{options.seed}"
    try:
        found, left_out = pictures.picture_prompts(options.prompt_dir, options.filter)
    except (OSError, ValueError) as error:
        raise host.HostError(f"--prompt_dir cannot be read: {error}") from None
    if left_out:
        print(f"{options.prompt_dir}: {pictures.summary(left_out)}", file=sys.stderr, flush=True)
    if not found:
        which = f" that fits --filter {options.filter}" if options.filter else ""
        raise host.HostError(f"--prompt_dir: no image with a same-named .txt or a line in prompts.txt{which} lies in "
                             f"{options.prompt_dir}. Images end in {', '.join(pictures.PICTURES)}")
    return [(image, prompt, folder / short_name(image.stem)) for image, prompt in found[:options.limit]]


def settings_of(options):
    """The options that make up the video, for Pipeline.run; None leaves a value to the preset or the graph."""
    names = ("negative_prompt", "seed", "steps", "guidance_scale", "eta", "frames", "fps", "frame_stride", "width",
             "height", "batch_size")
    settings = {name: getattr(options, name) for name in names}
    if options.preset != "demo":
        settings.update({name: value for name, value in DEFAULTS.items() if settings[name] is None})
    return settings


def animate(pipe, options, image, prompt, target):
    """Make the video or videos of one picture and save them."""
    print(image, "" if prompt is None else repr(prompt), flush=True)
    progress = Progress()
    try:
        videos = pipe.run(image, prompt, progress=progress, heard=commands.note, **settings_of(options))
    finally:
        progress.close()
    for i, (entry, *_) in enumerate(videos):
        path = Path(f"{target}_{i}.mp4" if len(videos) > 1 else f"{target}.mp4")
        print(f"saved {commands.save(pipe, entry, path, options.overwrite).resolve()}", flush=True)


def animate_folder(options, todo):
    """Make the videos of a folder as a batch; returns the exit code."""
    for image, prompt, _ in todo:
        print(image, repr(prompt), file=batch.stream(options), flush=True)
    template, rows = batch.presets_jobs(options.preset, options.checkpoint, settings_of(options), todo)
    return batch.submit(options, todo[0][2].parent, template, rows)


def main():
    arguments = sys.argv[1:]
    if arguments and arguments[0] in SUBCOMMANDS:
        module, _, function = SUBCOMMANDS[arguments[0]][0].partition(":")
        return getattr(importlib.import_module(module), function or "main")(arguments[1:])
    options = parse(arguments)
    batch.start(options)
    begin = time.monotonic()
    with commands.ending():
        todo = jobs(options)
        if options.prompt_dir:
            return animate_folder(options, todo)
        commands.make_folder(todo[0][2].parent)
        with commands.open_pipeline(options, options.preset) as pipe:
            print(f"ComfyUI is ready after {time.monotonic() - begin:.1f} s at {pipe.client.url}", flush=True)
            animate(pipe, options, *todo[0])


if __name__ == "__main__":
    sys.exit(main())
