"""Say whether a model, its inputs and its VAE look right, from a few sampling steps: good, doubtful or bad.

    python workflows/diagnose.py                                   the built-in demo model on an example image
    python workflows/diagnose.py 512 --image cat.png --prompt "a cat walks"
    python workflows/diagnose.py --checkpoint mine.safetensors --steps 20
    python workflows/diagnose.py --quick                           inputs, sampling and result only
    python workflows/diagnose.py --clipping                        what clipping of predicted x0 does to a video U-Net
                                                                   that was trained for minutes only
    python workflows/diagnose.py --json > diagnosis.json           for other programs

Runs the shipped graph workflows/api/diagnose.json, for a video U-Net clipping.json: it predicts a clip from its first
frames. Prints the findings and the numbers of every step, saves the plot, and exits 1 where the verdict is bad. Presets
and ComfyUI as for run.py.
"""

import argparse
import json
import sys
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

host.check_python()

import client  # noqa: E402
import commands  # noqa: E402
import errors  # noqa: E402
import generate  # noqa: E402
import graph  # noqa: E402
import pipeline  # noqa: E402

DIAGNOSE = "Stillmotion_DiagnoseModel"
EXAMPLES = host.WORKFLOWS / "examples"
EXAMPLE_IMAGE, EXAMPLE_CLIP = EXAMPLES / "stillmotion_star.png", EXAMPLES / "stillmotion_past.mp4"


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("preset", nargs="?", default="demo", choices=list(commands.PRESETS), help="default: demo")
    p.add_argument("--checkpoint", help="a checkpoint file, or a name in ComfyUI's models/checkpoints")
    p.add_argument("--image", type=Path, help="the start image (default: an example)")
    p.add_argument("--video", type=Path, help="for a video U-Net: the clip to predict (default: an example)")
    p.add_argument("--prompt", help="what happens in the video")
    p.add_argument("--seed", type=int, help="default: 123")
    p.add_argument("--steps", type=int, help="sampling steps, 1 to 1000 (default: 8)")
    p.add_argument("--guidance_scale", type=float, help="strength of the prompt (default: 7.5, demo: 1.5)")
    p.add_argument("--clip_x0", choices=("off", "static", "dynamic"), help="clipping of predicted x0 (default: off)")
    p.add_argument("--clip_value", type=float, help="limit for --clip_x0, and what counts as out of range (default: 3)")
    p.add_argument("--compare", action="store_true", help="sample with and without clipping and compare")
    p.add_argument("--clipping", action="store_true", help="the same with a video U-Net (default: an early one)")
    p.add_argument("--quick", action="store_true", help="only inputs, sampling and result: no parameters, VAE and EMA")
    p.add_argument("--json", action="store_true", help="print the diagnosis as JSON and save nothing")
    p.add_argument("--output", type=Path, default=Path("results/diagnosis.png"), help="default: results/diagnosis.png")
    p.add_argument("--clip", help="a CLIP-L file in models/text_encoders, for a video U-Net trained with it")
    p.add_argument("--vae", help="a file in models/vae, for a video U-Net trained with another VAE than the demo's")
    commands.add_server_flags(p)
    options = p.parse_args(arguments)
    problem = check(options)
    if problem:
        p.error(problem)
    return options


def check(options):
    """What is wrong with the options, or None. Checked before anything is set up or started."""
    if options.clip_value is not None and not 0.1 <= options.clip_value <= 100:
        return f"--clip_value is {options.clip_value}: choose 0.1 to 100 (3 suits image latents)"
    for name in ("image", "video"):
        file = getattr(options, name)
        if file and not file.is_file():
            return f"--{name}: there is no file {file}"
        if file and options.prompt is None:
            return f"--{name} needs a --prompt that says what happens"
    if options.clipping and (options.image or options.preset != "demo"):
        return "--clipping predicts a clip with a video U-Net: leave out the preset and --image; --video names a clip"
    return commands.check(options, ("steps",))


def fill(pipe, options):
    """The shipped graph for this model, with the options filled in."""
    config = None if pipe.checkpoint is None else generate.read_config(pipe)
    job = video_unet_graph(pipe, options, config) if options.clipping or config else image_graph(pipe, options)
    preset = commands.PRESETS[options.preset]
    pipe.set_inputs(
        job, None, graph.find_node(job, DIAGNOSE), seed=options.seed, steps=options.steps,
        clip_x0=options.clip_x0, clip_value=options.clip_value,
        cfg=preset.get("guidance_scale") if options.guidance_scale is None else options.guidance_scale,
        depth="quick" if options.quick else None, compare_clipping=options.compare or options.clipping,
        checkpoint=pipe.checkpoint)
    return job


def image_graph(pipe, options):
    """DynamiCrafter on an image."""
    if options.video:
        raise host.HostError("--video is for a video U-Net; DynamiCrafter starts from one --image.")
    job = json.loads((host.WORKFLOWS / "api" / "diagnose.json").read_text())
    preset, conditions = commands.PRESETS[options.preset], graph.find_node(job, pipeline.IMAGE_TO_VIDEO)

    def edit(node_id, **values):
        pipe.set_inputs(job, None, node_id, **values)

    edit(graph.find_node(job, pipeline.LOADER), checkpoint=pipe.checkpoint)
    edit(graph.find_node(job, "LoadImage"), image=pipe.client.upload(
        *pipeline.file_of(options.image or EXAMPLE_IMAGE)))
    edit(job[conditions]["inputs"]["positive"][0], text=options.prompt)
    edit(conditions, width=preset.get("width"), height=preset.get("height"), fs=preset.get("frame_stride"))
    return job


def video_unet_graph(pipe, options, config):
    """A video U-Net on the first frames of a clip. config: its checkpoint's, None to use the graph's."""
    if options.image:
        raise host.HostError(f"{pipe.checkpoint} is a video U-Net: it predicts a clip, so give --video, not --image.")
    job = json.loads((host.WORKFLOWS / "api" / "clipping.json").read_text())
    clip = options.video or EXAMPLE_CLIP
    pipe.set_inputs(job, None, graph.find_node(job, "LoadVideo"), file=pipe.client.upload(clip.read_bytes(), clip.name))
    text = job[graph.find_node(job, generate.CONDITIONS)]["inputs"]["positive"][0]
    pipe.set_inputs(job, None, text, text=options.prompt)
    if config:
        generate.adapt(job, config, options.clip, options.vae)
        pipe.set_inputs(job, None, graph.find_node(job, generate.LOADER), checkpoint=pipe.checkpoint)
    elif pipe.checkpoint is not None:
        raise host.HostError(f"{pipe.checkpoint} is no video U-Net of this pack, which --clipping needs.")
    return job


def main():
    options = parse(sys.argv[1:])
    commands.start(options)
    with commands.ending(), commands.open_pipeline(options, options.preset) as pipe:
        job = fill(pipe, options)
        outputs = pipe.client.run(job, heard=commands.note)
        found, *_ = client.results(outputs, graph.find_node(job, DIAGNOSE), "diagnosis")
        words = found.pop("text")
        if options.json:
            print(json.dumps(found, indent=1))
        else:
            plot, *_ = client.results(outputs, graph.find_node(job, "PreviewImage"))
            print(errors.plain(words))
            print(f"\nsaved {commands.save(pipe, plot, options.output, options.overwrite).resolve()}")
        sys.exit(found["verdict"] == "bad")


if __name__ == "__main__":
    main()
