"""Say whether a model, its inputs and its VAE look right, from a few sampling steps: good, doubtful or bad.

    python workflows/diagnose.py                                   the built-in demo model on an example image
    python workflows/diagnose.py 512 --image cat.png --prompt "a cat walks"
    python workflows/diagnose.py --checkpoint mine.safetensors --steps 20
    python workflows/diagnose.py --quick                           inputs, sampling and result only
    python workflows/diagnose.py --clip_x0 static --compare        with and without clipped x0
    python workflows/diagnose.py --json > diagnosis.json           for other programs

Runs the shipped graph workflows/api/diagnose.json. Prints the findings and the numbers of every step, saves the plot,
and exits 1 where the verdict is bad. Presets and ComfyUI as for run.py.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

import host

host.check_python()

import client  # noqa: E402
import graph  # noqa: E402
import pipeline  # noqa: E402

DIAGNOSE = "Stillmotion_DiagnoseModel"
EXAMPLE = host.WORKFLOWS / "examples" / "stillmotion_start.png"


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("preset", nargs="?", default="demo", choices=list(pipeline.PRESETS), help="default: demo")
    p.add_argument("--checkpoint", help="a checkpoint file, or a name in ComfyUI's models/checkpoints")
    p.add_argument("--image", type=Path, help="the start image (default: an example)")
    p.add_argument("--prompt", help="what happens in the video")
    p.add_argument("--seed", type=int, help="default: 123")
    p.add_argument("--steps", type=int, help="sampling steps, 1 to 1000 (default: 8)")
    p.add_argument("--guidance_scale", type=float, help="strength of the prompt (default: 7.5, demo: 1.5)")
    p.add_argument("--clip_x0", choices=("off", "static", "dynamic"), help="clipping of predicted x0 (default: off)")
    p.add_argument("--clip_value", type=float, help="limit for --clip_x0, and what counts as out of range (default: 3)")
    p.add_argument("--compare", action="store_true", help="sample with and without clipping and compare")
    p.add_argument("--quick", action="store_true", help="only inputs, sampling and result: no parameters, VAE and EMA")
    p.add_argument("--json", action="store_true", help="print the diagnosis as JSON and save nothing")
    p.add_argument("--output", type=Path, default=Path("results/diagnosis.png"), help="default: results/diagnosis.png")
    p.add_argument("--models", type=Path, help="another models folder to search (with checkpoints/ in it)")
    p.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    p.add_argument("--comfyui", metavar="PATH", help="use the ComfyUI in this folder")
    p.add_argument("--server", metavar="URL", help="use the ComfyUI that runs at this address")
    options = p.parse_args(arguments)
    problem = check(options)
    if problem:
        p.error(problem)
    return options


def check(options):
    """What is wrong with the options, or None; found before anything is set up or started."""
    if options.steps is not None and not 1 <= options.steps <= 1000:
        return f"--steps is {options.steps}: choose 1 to 1000"
    if options.clip_value is not None and not 0.1 <= options.clip_value <= 100:
        return f"--clip_value is {options.clip_value}: choose 0.1 to 100 (3 suits image latents)"
    if options.image and not options.image.is_file():
        return f"--image: there is no file {options.image}"
    if options.image and options.prompt is None:
        return "--image needs a --prompt that says what happens"
    if options.models and not options.models.is_dir():
        return f"--models: there is no folder {options.models}"
    ignored = [name for name in ("comfyui", "models", "device") if getattr(options, name)]
    if options.server and ignored:
        return f"--server brings its own ComfyUI, models and device: leave out --{' --'.join(ignored)}"
    return None


def fill(pipe, options):
    """The shipped graph with what the options say."""
    job = json.loads((host.WORKFLOWS / "api" / "diagnose.json").read_text())
    preset = pipeline.PRESETS[options.preset]

    def edit(node_id, **values):
        graph.set_inputs(job, None, pipe.schemas, node_id, **values)

    conditioning, node = graph.find_node(job, pipeline.IMAGE_TO_VIDEO), graph.find_node(job, DIAGNOSE)
    edit(graph.find_node(job, pipeline.LOADER), checkpoint=pipe.checkpoint)
    edit(graph.find_node(job, "LoadImage"), image=pipe.client.upload(*pipeline.file_of(options.image or EXAMPLE)))
    edit(job[conditioning]["inputs"]["positive"][0], text=options.prompt)
    edit(conditioning, width=preset.get("width"), height=preset.get("height"), fs=preset.get("frame_stride"))
    edit(node, seed=options.seed, steps=options.steps, clip_x0=options.clip_x0, clip_value=options.clip_value,
         cfg=preset.get("guidance_scale") if options.guidance_scale is None else options.guidance_scale,
         depth="quick" if options.quick else None, compare_clipping=options.compare or None,
         checkpoint=None if pipe.checkpoint == "demo" else pipe.checkpoint)
    return job


def main():
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped ends the server too
    try:
        with pipeline.Pipeline(options.preset, options.checkpoint, options.device or "auto", options.comfyui,
                               options.server, options.models) as pipe:
            job = fill(pipe, options)
            outputs = pipe.client.run(job)
            found, = outputs[graph.find_node(job, DIAGNOSE)]["diagnosis"]
            if options.json:
                print(json.dumps(found, indent=1))
            else:
                print(outputs[graph.find_node(job, "PreviewAny")]["text"][0])
                pipe.client.download(outputs[graph.find_node(job, "PreviewImage")]["images"][0], options.output)
                print(f"\nsaved {options.output.resolve()}")
            sys.exit(found["verdict"] == "bad")
    except (host.HostError, client.JobError, client.ServerGone) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the job was cancelled", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
