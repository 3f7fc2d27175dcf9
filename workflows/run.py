"""Turn a still image and a prompt into a video, with a ComfyUI that is set up on first use.

    python workflows/run.py                                        the built-in demo model on an example image
    python workflows/run.py 512 --image cat.png --prompt "a cat walks"
    python workflows/run.py 1024 42 cuda:1 --prompt_dir photos     every image with a same-named .txt, seed 42

Presets: demo (64x64), 256 (256x256, frame stride 3), 512 (512x320, fs 24), 1024 (1024x576, fs 10); the real ones need
a checkpoint, and the script says which and where. The preset's ComfyUI is a private one unless the pack lies in the
custom_nodes folder of another, or --comfyui or --server names one; nothing is installed into those.
"""

import argparse
import http.client
import signal
import sys
import tempfile
import time
from pathlib import Path

import runner  # noqa: F401  brings host, client, ... within reach

import host

host.check_python()

import client  # noqa: E402
import pipeline  # noqa: E402
from progress import Progress  # noqa: E402

EXAMPLE = host.WORKFLOWS / "examples" / "stillmotion_start.png"  # the workflow has its prompt
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tiff")
DEFAULTS = {"steps": 50, "eta": 1.0, "frames": 16, "fps": 8.0}  # of the presets 256, 512, 1024


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("preset", nargs="?", default="demo", choices=list(pipeline.PRESETS), help="default: demo")
    p.add_argument("seed_and_device", nargs="*", metavar="[SEED] [DEVICE]", help="short for --seed and --device")
    p.add_argument("--image", "--image_path", type=Path, help="the still image (default: an example)")
    p.add_argument("--prompt", "--prompt_text", help="what happens in the video")
    p.add_argument("--negative_prompt", help="what to keep out of the video")
    p.add_argument("--prompt_dir", type=Path, help="animate every image in this folder that has a same-named .txt")
    p.add_argument("--seed", type=int, help="default: 123")
    p.add_argument("--steps", "--num_inference_steps", type=int, help="sampling steps, 1 to 1000 (default: 50)")
    p.add_argument("--guidance_scale", type=float, help="strength of the prompt (default: 7.5, demo: 1.5)")
    p.add_argument("--eta", type=float, help="0 is deterministic, 1 adds fresh noise at each step (default: 1)")
    p.add_argument("--frames", "--video_length", type=int, help="length in frames (default: 16)")
    p.add_argument("--fps", type=float, help="frames per second of the saved file (default: 8)")
    p.add_argument("--frame_stride", type=int, help="motion: a stride for 256, frames per second for 512 and 1024")
    p.add_argument("--width", type=int, help="default: the preset's")
    p.add_argument("--height", type=int, help="default: the preset's")
    p.add_argument("--batch_size", type=int, default=1, help="videos for each image, from different noise (default: 1)")
    p.add_argument("--checkpoint", help="a checkpoint file, or a name in ComfyUI's models/checkpoints")
    p.add_argument("--models", type=Path, help="another models folder to search (with checkpoints/ in it)")
    p.add_argument("--output", "--output_dir", type=Path, help="folder for the videos (default: results)")
    p.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    p.add_argument("--comfyui", metavar="PATH", help="use the ComfyUI in this folder")
    p.add_argument("--server", metavar="URL", help="use the ComfyUI that runs at this address")
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


def check(options):
    """What is wrong with the options, or None; found before anything is set up or started."""
    for name in ("steps", "frames", "batch_size", "fps", "width", "height"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            return f"--{name} is {value}: it must be above 0"
    if options.steps and options.steps > 1000:
        return f"--steps is {options.steps}: the model has 1000 timesteps, so at most 1000"
    if options.prompt_dir and (options.image or options.prompt):
        return "--prompt_dir brings its own images and prompts: leave out --image and --prompt"
    ignored = [name for name in ("comfyui", "models", "device") if getattr(options, name)]
    if options.server and ignored:
        return f"--server brings its own ComfyUI, models and device: leave out --{' --'.join(ignored)}"
    if options.image and not options.image.is_file():
        return f"--image: there is no file {options.image}"
    if options.models and not options.models.is_dir():
        return f"--models: there is no folder {options.models}"
    if options.prompt_dir:
        try:
            targets = [target for _, _, target in jobs(options)]
        except UnicodeDecodeError as error:
            return f"--prompt_dir: a .txt in {options.prompt_dir} is not UTF-8 text ({error})"
        if not targets:
            return f"--prompt_dir: no image ({', '.join(IMAGES)}) with a same-named .txt lies in {options.prompt_dir}"
        same = {target.name for target in targets if targets.count(target) > 1}
        if same:
            return f"--prompt_dir: several images are named {', '.join(sorted(same))}; their videos would be one file"
    if options.image and options.prompt is None:
        return "--image needs a --prompt that says what happens"
    return None


def jobs(options):
    """[(image, prompt, path of the video without its extension)]"""
    if not options.prompt_dir:
        image = options.image or EXAMPLE
        folder = options.output or Path("results")
        return [(image, options.prompt, folder / f"{image.stem}_{options.preset}_seed{options.seed}")]
    folder = options.output or Path("results") / f"dynamicrafter_pipeline_{options.preset}_seed{options.seed}"
    images = sorted(f for f in options.prompt_dir.glob("*") if f.suffix.lower() in IMAGES)
    texts = [(image, image.with_suffix(".txt")) for image in images]
    return [(image, text.read_text(encoding="utf-8").strip(), folder / image.stem)
            for image, text in texts if text.is_file()]


def animate(pipe, options):
    """Make all videos; with --prompt_dir an image that fails does not stop the others. Returns how many failed."""
    settings = dict(negative_prompt=options.negative_prompt, seed=options.seed, steps=options.steps,
                    guidance_scale=options.guidance_scale, eta=options.eta, frames=options.frames, fps=options.fps,
                    frame_stride=options.frame_stride, width=options.width, height=options.height)
    if options.preset != "demo":
        settings.update({k: v for k, v in DEFAULTS.items() if settings[k] is None})
    failed = 0
    for image, prompt, target in jobs(options):
        print(image, "" if prompt is None else repr(prompt), flush=True)
        progress = Progress()
        try:
            videos = pipe.run(image, prompt, batch_size=options.batch_size, progress=progress, **settings)
        except client.JobError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        finally:
            progress.close()
        for i, (entry,) in enumerate(videos):
            path = Path(f"{target}_{i}.mp4" if len(videos) > 1 else f"{target}.mp4")
            try:
                pipe.client.download(entry, path)
            except (OSError, http.client.HTTPException) as error:
                if pipe.server:
                    pipe.server.keep = True
                    made = pipe.server.base / "output" / entry["subfolder"] / entry["filename"]
                    print(f"the finished video is kept as {made}", flush=True)
                raise host.HostError(f"cannot save {path}: {error}. Free some space or choose another --output.")
            print(f"saved {path.resolve()}", flush=True)
    return failed


def make_folder(options):
    """The folder of the videos, made before the work begins."""
    folder = jobs(options)[0][2].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise host.HostError(f"cannot write into {folder}: {error}. Choose another folder with --output.") from None


def main():
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped ends the server too
    start = time.monotonic()
    try:
        make_folder(options)
        with pipeline.Pipeline(options.preset, options.checkpoint, options.device or "auto", options.comfyui,
                               options.server, options.models) as pipe:
            print(f"ComfyUI is ready after {time.monotonic() - start:.1f} s at {pipe.client.url}", flush=True)
            failed = animate(pipe, options)
            if failed:
                sys.exit(f"error: {failed} of {len(jobs(options))} videos failed")
    except (host.HostError, client.ServerGone) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the job was cancelled", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
