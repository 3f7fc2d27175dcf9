"""Make a video block by block, and change its prompt while it is made.

    python workflows/run.py live --prompt "a red circle moves right on a white background"
    python workflows/run.py live --prompt "a cat walks" --checkpoint self_forcing_dmd.pt --frames 241

Type a new prompt and press Enter: it begins with the next block. Without --frames the video goes on until Ctrl-C or
Ctrl-D; the block that is being made then ends it. Each block is saved as it comes, live_seed123/block_0001.mp4, ...,
and the whole video at the end, live_seed123.mp4. Then the prompts that were sent are printed with their start frames;
in a file for --prompts they make the same video again.

The demo model takes the example image. A checkpoint of causal Wan 2.1 (text to video) lies in the models folder
diffusion_models, with its text encoder in text_encoders and its VAE in vae.
"""

import argparse
import base64
import binascii
import json
import signal
import sys
import threading
import time
from pathlib import Path

import client
import commands
import errors
import graph
import host
from errors import plain
from inprocess import common

API = host.WORKFLOWS / "api" / "causal_long_video.json"
LOADER, START, TIMELINE, SAMPLER, TO_FILE = ("Stillmotion_" + name for name in (
    "LoadCausalWan", "CausalWanImageToVideo", "PromptTimeline", "BlockAutoregressiveSampler",
    "BlockAutoregressiveToFile"))
UNTIL_STOPPED = -1
WAN = {"block": 3, "window": 12, "sink": 3, "endless": False, "steps": "1000, 750, 500, 250", "cfg": 1.0}
WAN_SIZE = {"width": 832, "height": 480}
WAN_START = 9  # video frames of the empty latent, one block; a text-to-video model needs no more


def parse(arguments):
    p = argparse.ArgumentParser(prog="run.py live", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", help="what happens in the video (default: the example's)")
    p.add_argument("--prompts", metavar="FILE", type=Path, help="a file of lines such as 12: a red circle moves up")
    p.add_argument("--image", type=Path, help="the start image, demo model only (default: an example)")
    p.add_argument("--frames", type=int, help="length in frames (default: until stopped)")
    p.add_argument("--seed", type=int, default=123, help="default: 123")
    p.add_argument("--fps", type=float, help="frames per second (default: demo 8, Wan 16)")
    p.add_argument("--width", type=int, help="default: demo 64, Wan 832")
    p.add_argument("--height", type=int, help="default: demo 64, Wan 480")
    p.add_argument("--checkpoint", help="a file in models/diffusion_models (default: the demo)")
    p.add_argument("--lora", help="a file in models/loras, such as LongLive's")
    p.add_argument("--text_encoder", default="umt5_xxl_fp8_e4m3fn_scaled.safetensors",
                   help="of --checkpoint, in models/text_encoders (default: %(default)s)")
    p.add_argument("--vae", default="wan_2.1_vae.safetensors",
                   help="of --checkpoint, in models/vae (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("results"), help="folder for the videos (default: results)")
    commands.add_server_flags(p)
    options = p.parse_args(arguments, argparse.Namespace(steps=None))
    problem = check(options)
    if problem:
        p.error(problem)
    return options


def check(options):
    """What is wrong with the options, or None."""
    for name, path in (("image", options.image), ("prompts", options.prompts)):
        if path and not path.is_file():
            return f"--{name}: there is no file {path}"
    if options.image and options.checkpoint:
        return "--image is for the demo model: the checkpoints of this command make videos from text"
    if options.prompt is not None and not options.prompt.strip():
        return "--prompt is empty: say what happens in the video"
    if options.lora and not options.checkpoint:
        return "--lora belongs to a --checkpoint"
    return commands.check(options, ("frames", "fps", "width", "height"))


def job_of(options, image):
    """The graph to queue: the shipped one with its sampler writing straight to a file. image: its name on the server,
    None for the graph's."""
    job = json.loads(API.read_text())
    loader, start, sampler, timeline = (graph.find_node(job, name) for name in (LOADER, START, SAMPLER, TIMELINE))
    towers = job[start]["inputs"]["vae"][0]
    positive, negative = (job[start]["inputs"][name][0] for name in ("positive", "negative"))
    for saver in ("VAEDecode", "Stillmotion_SaveVideo"):
        del job[graph.find_node(job, saver)]
    values = job[sampler]["inputs"]
    job[sampler]["class_type"] = TO_FILE
    values |= {"length": options.frames or UNTIL_STOPPED, "filename_prefix": "video/live", "crf": 16,
               "fps": options.fps or (16.0 if options.checkpoint else 8.0), "seed": options.seed, "clip": [towers, 1]}
    if options.prompt is not None:
        job[positive]["inputs"]["text"] = options.prompt
    if options.prompts:
        job[timeline]["inputs"]["prompts"] = options.prompts.read_text(encoding="utf-8")
    else:
        del values["timeline"], job[timeline]
    if image:
        job[graph.find_node(job, "LoadImage")]["inputs"]["image"] = image
    size = {name: getattr(options, name) for name in ("width", "height")}
    if options.checkpoint:
        use_wan(job, options, loader, start, sampler, towers)
        size = {name: value or WAN_SIZE[name] for name, value in size.items()}
    elif options.frames:
        job[start]["inputs"]["length"] = options.frames
    job[start]["inputs"] |= {name: value for name, value in size.items() if value}
    job[positive]["inputs"]["clip"] = job[negative]["inputs"]["clip"] = values["clip"]
    if options.prompts:
        job[timeline]["inputs"]["clip"] = values["clip"]
    return job, sampler


def use_wan(job, options, loader, start, sampler, towers):
    """Put a text-to-video model of Wan 2.1 with its text encoder and VAE in place of the demo."""
    job[loader]["inputs"] |= {"checkpoint": options.checkpoint, "lora": options.lora or "none"}
    job[towers] = {"class_type": "CLIPLoader", "inputs": {"clip_name": options.text_encoder, "type": "wan"}}
    job["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": options.vae}}
    job[sampler]["inputs"] |= {**WAN, "clip": [towers, 0], "vae": ["vae", 0]}
    job[start]["inputs"] |= {"vae": ["vae", 0], "block": WAN["block"], "length": WAN_START}
    for name in ("image", "clip_vision"):
        del job[start]["inputs"][name]
    del job[graph.find_node(job, "LoadImage")]


class Show:
    """Prints and saves what the server tells of the run; `run` holds its prompt_id and node_id once it has `begun`."""

    def __init__(self, folder):
        self.folder, self.run, self.sent = folder, {}, []
        self.begun, self.last = threading.Event(), time.monotonic()

    def heard(self, kind, data):
        """A message of the server. Raises StrangeServer for a block that is none, OSError if it cannot be saved."""
        if kind != "stillmotion.live":
            commands.note(kind, data)
            return
        try:
            getattr(self, f"on_{data['kind']}", lambda data: None)(data)
        except (LookupError, TypeError, ValueError, binascii.Error) as error:
            raise errors.StrangeServer(f"the server's message about a block is not understood ({plain(error)}): put "
                                       "the same version of the pack at both ends.") from None

    def on_begin(self, data):
        self.run = {name: str(data[name]) for name in ("prompt_id", "node_id")}
        self.last = time.monotonic()
        self.begun.set()
        blocks = data["blocks"]
        print("until stopped" if blocks is None else f"{int(blocks)} blocks", flush=True)

    def on_block(self, data):
        number, first, count = (int(data[name]) for name in ("block", "frame", "count"))
        path = self.folder / f"block_{number:04}.mp4"
        common("saving").write_file(path, base64.b64decode(data["data"], validate=True))
        now = time.monotonic()
        print(f"block {number}: frames {first + 1} to {first + count}, {now - self.last:.2f} s, {path}", flush=True)
        self.last = now

    def on_prompt(self, data):
        text = plain(data["text"])
        if "error" in data:
            print(f"not used: {text!r}: {plain(data['error'])}", file=sys.stderr, flush=True)
            return
        self.sent.append(f"{int(data['frame'])}: {text}")
        print(f"block {int(data['block'])} begins with: {text}", flush=True)


def post(pipe, show, path, **values):
    """Send a message to the run, once it has begun, and print the answer."""
    show.begun.wait()
    try:
        print(plain(pipe.client.json(f"/stillmotion/{path}", {**show.run, **values}, dict)["message"]), flush=True)
    except client.BadStatus as error:
        try:
            words = json.loads(error.text)["error"]
        except (ValueError, LookupError, TypeError):
            words = error
        print(plain(words), file=sys.stderr, flush=True)
    except (errors.ServerGone, LookupError) as error:
        print(plain(error), file=sys.stderr, flush=True)


def read_prompts(pipe, show, stream):
    """Send every line of `stream`; its end on a terminal (Ctrl-D) stops the video."""
    for line in stream:
        if line.strip():
            post(pipe, show, "steer", text=line.strip())
    if stream.isatty():
        post(pipe, show, "stop")


def stop_on_interrupt(pipe, show):
    """The first Ctrl-C ends the video with its current block, the next one cancels the job."""
    def handler(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not show.begun.is_set():
            raise KeyboardInterrupt
        print("\nCtrl-C again cancels the job", file=sys.stderr, flush=True)
        threading.Thread(target=post, args=(pipe, show, "stop"), daemon=True).start()

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def new_folder(path):
    """Create the folder `path`, or the next free name."""
    name = client.FreeName(path)
    while True:
        try:
            name.path.mkdir()
            return name.path
        except FileExistsError:
            name.number += 1


def main(arguments):
    options = parse(arguments)
    commands.start(options)
    with commands.ending():
        import pipeline

        commands.make_folder(options.output)
        with pipeline.Pipeline("demo", None, options.device or "auto", options.comfyui, options.server,
                               options.models) as pipe:
            try:
                pipe.client.json("/stillmotion/watch", {"client_id": pipe.client.id, "form": "mp4"})
            except client.BadStatus as error:
                raise host.HostError(f"the server's pack takes no messages ({error}): put the same version of it at "
                                     "both ends.") from None
            image = pipe.client.upload(*pipeline.file_of(options.image)) if options.image else None
            job, sampler = job_of(options, image)
            with commands.saving(options.output, pipe):
                folder = new_folder(options.output / f"live_seed{options.seed}")
            show = Show(folder)
            print("type a new prompt and press Enter; Ctrl-C ends the video", flush=True)
            threading.Thread(target=read_prompts, args=(pipe, show, sys.stdin), daemon=True).start()
            stop_on_interrupt(pipe, show)
            with commands.saving(folder, pipe):
                outputs = pipe.client.run(job, heard=show.heard)
            entry, = client.results(outputs, sampler)
            path = commands.save(pipe, entry, folder.with_suffix(".mp4"), options.overwrite)
            print(f"saved {path.resolve()}", flush=True)
            if show.sent:
                print("the prompts that were sent, as lines for --prompts and Prompt Timeline:", *show.sent, sep="\n")
