"""Make videos from prompts with a video U-Net, with a ComfyUI that is set up on first use.

    python workflows/generate.py --prompts "a red circle moves left on a white background"
    python workflows/generate.py --checkpoint mine.safetensors --prompts A B --save_gif --save_frames --visualize
    python workflows/generate.py --checkpoint mine.safetensors      asks for prompts; an empty line ends

Runs the shipped graph workflows/api/video_unet_text_to_video.json; an option that is not given leaves it as is. Each
prompt gives PROMPT.mp4 in the output folder, with --save_gif PROMPT.gif, with --save_frames PNG files in PROMPT/;
--visualize draws all of them on one sheet, preview.png. Files that are there already stay, and new ones get a number,
unless --overwrite is given.
"""

import argparse
import io
import json
import os
import re
import shutil
import sys
import urllib.parse
from pathlib import Path

import runner  # noqa: F401  makes host, client, ... importable

import host

host.check_python()

import client  # noqa: E402
import commands  # noqa: E402
import graph  # noqa: E402
import pipeline  # noqa: E402
from inprocess import common  # noqa: E402
from progress import Progress  # noqa: E402

LOADER = "Stillmotion_LoadVideoUNet"
CONDITIONS = "Stillmotion_VideoUNetConditions"
HEADER = "stillmotion.video_unet"
DEMO_ENCODERS = ("demo", "demo, 96x96")  # checkpoints of Load DynamiCrafter whose encoders small models use
FORMATS = {"mp4": "", "gif": "-gif", "png frames": "-frames"}  # suffix of the save node's id
SHOWN = 8  # frames of a video on the preview sheet


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", help="a video U-Net file, or a name in ComfyUI's models/checkpoints (default: demo)")
    p.add_argument("--prompts", nargs="+", default=[], metavar="PROMPT", help="default: ask for them")
    p.add_argument("--negative_prompt", help="what to keep out of the video")
    p.add_argument("--output", "--output_dir", type=Path, default=Path("results/generate"),
                   help="folder for the videos (default: results/generate)")
    p.add_argument("--save_gif", action="store_true", help="save a GIF beside each MP4")
    p.add_argument("--save_frames", action="store_true", help="save single frames as PNG files")
    p.add_argument("--visualize", action="store_true", help="draw all videos on one sheet, preview.png")
    p.add_argument("--seed", type=int, help="of the noise (default: the graph's)")
    p.add_argument("--steps", type=int, help="sampling steps, 1 to 1000 (default: the graph's)")
    p.add_argument("--guidance_scale", type=float, help="strength of the prompt (default: the graph's)")
    p.add_argument("--eta", type=float, help="0 is deterministic, 1 adds fresh noise at each step")
    p.add_argument("--num_frames", type=int, help="length in frames (default: as the model was trained)")
    p.add_argument("--width", type=int, help="default: as the model was trained")
    p.add_argument("--height", type=int, help="default: as the model was trained")
    p.add_argument("--fps", type=float, help="frames per second of the saved files (default: 8)")
    p.add_argument("--clip", help="a CLIP-L file in models/text_encoders, for models trained with it")
    p.add_argument("--vae", help="a file in models/vae, for models trained with another VAE than the demo's")
    commands.add_server_flags(p)
    options = p.parse_args(arguments)
    problem = check(options)
    if problem:
        p.error(problem)
    return options


def check(options):
    """What is wrong with the options, or None. Checked before anything is set up or started."""
    if any(not prompt.strip() for prompt in options.prompts):
        return "--prompts holds an empty prompt: say what to see, or leave --prompts out to be asked"
    return commands.check(options, ("steps", "num_frames", "fps", "width", "height"))


def ask(stream):
    """Read prompts from a stream, one per line, until an empty line or EOF."""
    while True:
        if stream.isatty():
            print("prompt (an empty line ends): ", end="", flush=True)
        line = stream.readline().removeprefix("\ufeff").strip()
        if not line:
            return
        yield line


def file_stem(number, prompt):
    """A file name for the prompt: its words, plus its number to make it unique."""
    return f"{number:02}_{re.sub(r'[^a-z0-9]+', '_', prompt.lower()).strip('_')[:60]}".rstrip("_")


def read_config(pipe):
    """What `adapt` needs from the chosen checkpoint's header; None if the file is not a video U-Net."""
    query = urllib.parse.urlencode({"filename": pipe.checkpoint})
    try:
        found = pipe.client.json(f"/view_metadata/checkpoints?{query}") or {}
    except client.BadStatus:  # not a .safetensors file, or one without our header
        return None
    with pipe.client.understood("/view_metadata"):
        if HEADER not in found:
            return None
        config = json.loads(found[HEADER])
        return {name: config[name] for name in ("space", "text_encoder")}


def adapt(job, config, clip, vae):
    """Replace the demo's text encoder and VAE in the graph with those the model was trained with."""
    loader, towers = graph.find_node(job, LOADER), graph.find_node(job, pipeline.LOADER)

    def rewire(old, new):
        for node in job.values():
            for name, value in node["inputs"].items():
                if value == old:
                    node["inputs"][name] = new

    if config["text_encoder"] == "clip_l" and not clip:
        raise host.HostError("this model was trained with the text encoder CLIP-L: name its file in "
                             "models/text_encoders with --clip.")
    demo = config["text_encoder"] if config["text_encoder"] in DEMO_ENCODERS else "demo"  # of the trainer's default VAE
    job[towers]["inputs"]["checkpoint"] = demo
    if clip:
        job["clip"] = {"class_type": "CLIPLoader", "inputs": {"clip_name": clip, "type": "stable_diffusion"}}
        rewire([towers, 1], ["clip", 0])
    if config["space"] == "pixels":
        job[loader]["inputs"].pop("vae", None)
        rewire([towers, 3], [loader, 1])
    elif vae:
        rewire([towers, 3], [loader, 1])
        job["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": vae}}
        job[loader]["inputs"]["vae"] = ["vae", 0]


def prepare(pipe, options):
    """(graph, ids of its save nodes by format), with everything set except the prompt."""
    job = json.loads((host.WORKFLOWS / "api" / "video_unet_text_to_video.json").read_text())
    if pipe.checkpoint is not None:
        config = read_config(pipe)
        if config is None:
            raise host.HostError(f"{pipe.checkpoint} is no video U-Net of this pack: its header has no {HEADER}. Give "
                                 "a .safetensors file written by Train Video Model or workflows/train.py.")
        adapt(job, config, options.clip, options.vae)

    def edit(node_id, **values):
        pipe.set_inputs(job, None, node_id, **values)

    conditions, saver = graph.find_node(job, CONDITIONS), graph.find_node(job, pipeline.SAVER)
    edit(graph.find_node(job, LOADER), checkpoint=pipe.checkpoint)
    edit(conditions, width=options.width, height=options.height, frames=options.num_frames)
    edit(job[conditions]["inputs"]["negative"][0], text=options.negative_prompt)
    edit(graph.find_node(job, pipeline.SAMPLER), seed=options.seed, steps=options.steps, cfg=options.guidance_scale,
         eta=options.eta)
    edit(saver, fps=options.fps, format="mp4")
    wanted = ["mp4"] + ["gif"] * options.save_gif + ["png frames"] * (options.save_frames or options.visualize)
    savers = {kind: saver + FORMATS[kind] for kind in wanted}
    for kind, node in savers.items():
        job[node] = {"class_type": pipeline.SAVER, "inputs": {**job[saver]["inputs"], "format": kind}}
    return job, savers


def generate(pipe, options, prompts):
    """Generate and save the video of every prompt; a failure does not stop the others. Returns (rows of the preview
    sheet, number of failures, number of prompts)."""
    job, savers = prepare(pipe, options)
    text = job[graph.find_node(job, CONDITIONS)]["inputs"]["positive"][0]
    rows, failed, number = [], 0, 0
    for number, prompt in enumerate(prompts, 1):
        pipe.set_inputs(job, None, text, text=prompt)
        progress = Progress()
        try:
            outputs = pipe.client.run(job, None, pipe.report(job, progress), heard=commands.note)
            found = {kind: client.results(outputs, node) for kind, node in savers.items()}
            frames = save(pipe, options, file_stem(number, prompt), found)
        except (client.JobError, client.StrangeServer) as error:
            failed += 1
            print(f"error: {prompt!r}: {error}", file=sys.stderr, flush=True)
            continue
        finally:
            progress.close()
        rows.append((prompt, frames))
    return rows, failed, number


def save(pipe, options, stem, found):
    """Save the files of one prompt; returns the bytes of the frames for the preview sheet."""
    kinds = {".mp4": True, ".gif": options.save_gif, "": options.save_frames}
    name = client.FreeName(options.output / stem)
    while not options.overwrite and any(os.path.lexists(f"{name.path}{kind}") for kind, made in kinds.items() if made):
        name.number += 1  # files of one prompt share one name
    for kind in ("mp4", "gif"):
        if kind in found:
            path = commands.save(pipe, found[kind][0], Path(f"{name.path}.{kind}"), options.overwrite)
            print(f"saved {path.resolve()}", flush=True)
    frames = found.get("png frames", [])
    if options.save_frames:
        print(f"saved {save_frames(pipe, frames, name, options.overwrite).resolve()}", flush=True)
    if not options.visualize:
        return []
    count = min(SHOWN, len(frames))  # evenly spaced, from first to last
    return [pipe.client.view(frames[i * (len(frames) - 1) // max(1, count - 1)]).read() for i in range(count)]


def save_frames(pipe, entries, name, overwrite):
    """Save frames atomically as numbered files in a new folder; returns the folder. Raises HostError."""
    with commands.saving(name.path, pipe), common("saving").new_file(name) as content:
        content.mkdir()
        for i, entry in enumerate(entries, 1):  # names from the server could point anywhere
            with open(content / f"frame_{i:04}.png", "xb") as file:
                pipe.client.fetch(entry, file)
        if overwrite:
            shutil.rmtree(name.path, ignore_errors=True)
    return name.path


def draw_sheet(rows, path, overwrite=False, edge=128, gap=4, line=20):
    """One row per video: the prompt, with its frames below. Saved like Client.download; returns the path."""
    from PIL import Image, ImageDraw, ImageFont
    sheet = Image.new("RGB", (SHOWN * (edge + gap) + gap, len(rows) * (edge + line + gap) + gap), (32, 32, 36))
    pen = ImageDraw.Draw(sheet)
    for i, (prompt, frames) in enumerate(rows):
        top = gap + i * (edge + line + gap)
        pen.text((gap, top), prompt, (230, 230, 230), ImageFont.load_default(13))
        for j, data in enumerate(frames):
            frame = Image.open(io.BytesIO(data)).convert("RGB")
            frame = frame.resize((edge, max(1, min(edge, edge * frame.height // frame.width))))
            sheet.paste(frame, (gap + j * (edge + gap), top + line))
    saving, name = common("saving"), client.FreeName(path)
    with saving.replacing(path) if overwrite else saving.new_file(name) as content:
        sheet.save(content, "PNG")
    return name.path


def main():
    options = parse(sys.argv[1:])
    commands.start(options)
    with commands.ending():
        commands.make_folder(options.output)
        with commands.open_pipeline(options) as pipe:
            rows, failed, number = generate(pipe, options, options.prompts or ask(sys.stdin))
            if rows and options.visualize:
                with commands.saving(sheet := options.output / "preview.png", pipe):
                    print(f"saved {draw_sheet(rows, sheet, options.overwrite).resolve()}")
            commands.tell(failed, number, "videos")


if __name__ == "__main__":
    main()
