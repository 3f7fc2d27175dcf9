"""The image-to-video workflow as a Python call, on the same graph that ComfyUI users load.

    import sys; sys.path.insert(0, "workflows/runner")
    import host; host.reexec()                      # sets up ComfyUI on first use
    from pipeline import Pipeline, save_video
    with Pipeline("512") as pipeline:
        videos = pipeline("cat.png", "a cat walks", num_inference_steps=50)
        save_video(videos, "cat.mp4", fps=8)
"""

import io
import json
import sys
from pathlib import Path

import client
import graph
import host
import inprocess
import launch
from commands import PRESETS
from errors import plain

API = host.WORKFLOWS / "api" / "animate.json"
UI = host.WORKFLOWS / "animate.json"
LOADER = "Stillmotion_LoadDynamiCrafter"
IMAGE_TO_VIDEO = "Stillmotion_DynamiCrafterImageToVideo"
SAMPLER = "Stillmotion_DDIMSampler"
SAVER = "Stillmotion_SaveVideo"
LARGEST_SENT = 32 << 20  # bytes per picture; ComfyUI accepts 100 MB
LONGEST_SIDE = 4096  # pixels, for a picture that is converted before upload

REPOSITORY = {"256": "Doubiiu/DynamiCrafter", "512": "Doubiiu/DynamiCrafter_512", "1024": "Doubiiu/DynamiCrafter_1024"}


def choose_checkpoint(preset, names):
    """This preset's file among the names in the checkpoints folder, or None. Prefers a full file, because a pruned one
    needs separate encoders."""
    fitting = [n for n in names if preset in n and "dynamicrafter" in n.lower()
               and not any(other in n.lower() for other in ("interp", "toon", "cil"))]
    return min(fitting, key=lambda n: ("pruned" in n.lower(), n), default=None)


def missing_checkpoint(preset, folder):
    """The message for a user whose checkpoints folder lacks the preset's file."""
    pruned = "" if preset == "256" else (
        f" (or the smaller dynamicrafter_{preset}_fp16_pruned.safetensors from Kijai/DynamiCrafter_pruned, which needs "
        "core's CLIP, CLIP Vision and VAE loaders and so does not run with this script)")
    return (f"no DynamiCrafter {preset} checkpoint was found in {folder}. Download model.ckpt (10.4 GB) from Hugging "
            f"Face, repository {REPOSITORY[preset]}{pruned}, and save it as "
            f"{folder / f'dynamicrafter_{preset}.ckpt'} (`run.py fetch dynamicrafter_{preset}` does this), or name "
            "a file with --checkpoint.")


def find_checkpoint(server, preset, name=None, models=None):
    """The checkpoint that this server (a Client) has for the preset, or `name` if it is there; None for the demo, which
    the graphs themselves name. Raises HostError.

    models: the models folder of a server that we started.
    """
    folder = (models or Path("models")) / "checkpoints"
    names = [plain(name) for name in server.json("/models/checkpoints", kind=list)]
    if name and name != "demo":
        if name not in names:
            where = f"neither a file nor in {folder}" if models else "not in the server's models/checkpoints"
            raise host.HostError(f"checkpoint {name!r} is {where} (there: {', '.join(sorted(names)) or 'none'}).")
        return name
    if preset == "demo" or name:
        return None
    chosen = choose_checkpoint(preset, names)
    if chosen is None:
        raise host.HostError(missing_checkpoint(preset, folder))
    return chosen


def read_graphs():
    """(API graph, workflow of the page) of `animate`."""
    return json.loads(API.read_text()), json.loads(UI.read_text()) if UI.exists() else None


def inputs_of(job):
    """Ids of the nodes for the checkpoint, the picture and the prompt."""
    conditioning = graph.find_node(job, IMAGE_TO_VIDEO)
    return graph.find_node(job, LOADER), graph.find_node(job, "LoadImage"), job[conditioning]["inputs"]["positive"][0]


def animate_settings(job, preset, negative_prompt=None, seed=None, steps=None, guidance_scale=None, eta=None,
                     frames=None, frame_stride=None, width=None, height=None, fps=None, batch_size=None, format=None):
    """{node id: {input: value}} of a preset; None means the default of the preset, and then of the graph."""
    preset, conditioning = PRESETS[preset], graph.find_node(job, IMAGE_TO_VIDEO)
    return {
        job[conditioning]["inputs"]["negative"][0]: {"text": negative_prompt},
        conditioning: {"width": width or preset.get("width"), "height": height or preset.get("height"),
                       "frames": frames, "fs": preset.get("frame_stride") if frame_stride is None else frame_stride,
                       "batch_size": batch_size},
        graph.find_node(job, SAMPLER): {
            "seed": seed, "steps": steps, "eta": eta,
            "cfg": preset.get("guidance_scale") if guidance_scale is None else guidance_scale},
        graph.find_node(job, SAVER): {"fps": fps, "format": format},
    }


class Pipeline:
    """A ComfyUI with a given model, ready to turn images and prompts into videos.

    resolution: a key of PRESETS. checkpoint: a file, or a name in the checkpoints folder. device: auto, cpu, cuda or
    cuda:N. comfyui: folder of an existing ComfyUI. server: URL of a running one. models: a folder with checkpoints/
    to search besides the ComfyUI's own. Raises host.HostError.
    """

    def __init__(self, resolution="demo", checkpoint=None, device="auto", comfyui=None, server=None, models=None):
        if resolution not in PRESETS:
            raise host.HostError(f"preset {resolution!r} is unknown: use one of {', '.join(PRESETS)}.")
        self.resolution = resolution
        file = Path(checkpoint).expanduser().absolute() if checkpoint and not server else None
        local_file = file is not None and file.is_file()
        self.server = None
        if not server:
            found = host.find_host(comfyui)
            # the demo's matrices are so small that more threads only cost synchronization, above all on a busy machine
            self.server = launch.Server(found, device, [models] if models else [], [file.parent] if local_file else [],
                                        threads=1 if resolution == "demo" else None)
        try:
            self.client = client.Client(server or self.server.url, self.server)
            self.schemas = self.client.json("/object_info", kind=dict)
            if LOADER not in self.schemas:
                raise host.HostError(f"the ComfyUI at {self.client.url} does not have the Stillmotion nodes: "
                                     "put the pack into its custom_nodes folder and start it again.")
            self.checkpoint = find_checkpoint(self.client, resolution, file.name if local_file else checkpoint,
                                              launch.models_folder(found.comfyui) if not server else None)
        except BaseException:
            self.close()
            raise

    def run(self, image, prompt, negative_prompt=None, seed=None, steps=None, guidance_scale=None, eta=None,
            frames=None, frame_stride=None, width=None, height=None, fps=None, batch_size=None, format=None,
            progress=None, heard=None):
        """Animate one image (a file or a PIL image); None means the default of the preset or the workflow.

        Returns one list of output entries (see Client.download) per video of the batch (in a format that gives one
        file per video). `progress(node name, value, maximum)` is called at every step, `heard` as in Client.run.
        Raises client.JobError (also for a picture that cannot be read) and client.ServerGone.
        """
        job, workflow = read_graphs()
        settings = animate_settings(job, self.resolution, negative_prompt, seed, steps, guidance_scale, eta, frames,
                                    frame_stride, width, height, fps, batch_size, format)
        loader, picture, text = inputs_of(job)
        self.set_inputs(job, workflow, loader, checkpoint=self.checkpoint)
        self.set_inputs(job, workflow, picture, image=self.client.upload(*file_of(image)))
        self.set_inputs(job, workflow, text, text=prompt)
        for node_id, values in settings.items():
            self.set_inputs(job, workflow, node_id, **values)
        outputs = self.client.run(job, workflow, self.report(job, progress), heard=heard)
        entries = client.results(outputs, graph.find_node(job, SAVER))
        return [[entry] for entry in entries] if batch_size and batch_size > 1 else [entries]

    def set_inputs(self, job, workflow, node_id, **values):
        """graph.set_inputs; raises HostError if the server's nodes do not match the graph."""
        try:
            graph.set_inputs(job, workflow, self.schemas, node_id, **values)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise host.HostError(f"the Stillmotion nodes at {self.client.url} are not those of this command "
                                 f"({plain(error)}): put the same version of the pack at both ends.") from None

    def report(self, job, progress):
        """A callback for Client.run that calls `progress(node name, value, maximum)`."""
        def tell(node_id, value, maximum):
            schema = self.schemas.get(job[node_id]["class_type"])
            name = schema.get("display_name") if isinstance(schema, dict) else None
            progress(plain(name or job[node_id]["class_type"]), value, maximum)

        return tell if progress else None

    def __call__(self, image, prompt, negative_prompt="", num_inference_steps=50, guidance_scale=None, eta=1.0,
                 frame_stride=None, num_frames=16, height=None, width=None, seed=123):
        """Animate an image (a file or a PIL image); returns the frames [T, H, W, 3], float32 in 0..1, uncompressed."""
        import torch

        return torch.from_numpy(self.frames(
            image, prompt, negative_prompt=negative_prompt, seed=seed, steps=num_inference_steps, eta=eta, width=width,
            guidance_scale=guidance_scale, frames=num_frames, frame_stride=frame_stride, height=height)).float() / 255

    def frames(self, image, prompt, **settings):
        """Like `run`, for one video; returns its frames uncompressed: uint8 [T, H, W, 3] as a numpy array."""
        import numpy
        from PIL import Image

        entries, = self.run(image, prompt, format="png frames", **settings)
        frames = []
        for entry in entries:
            with self.client.view(entry) as answer:
                frames.append(numpy.array(Image.open(io.BytesIO(answer.read())).convert("RGB")))
        return numpy.stack(frames)

    def close(self):
        if self.server:
            self.server.stop()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def file_of(image):
    """(bytes, name) to upload for an image (a file or a PIL image). Raises JobError if it cannot be read.

    A large image, or one that ComfyUI might read differently (an animation, a rare format), is sent as a PNG.
    """
    png, name = io.BytesIO(), "image.png"
    if isinstance(image, (str, Path)):
        pictures, path = inprocess.common("pictures"), Path(image)
        try:
            image = pictures.open_start(path)
        except ValueError as error:
            raise client.JobError(str(error)) from None
        if pictures.is_plain(path) and path.stat().st_size <= LARGEST_SENT:
            return path.read_bytes(), path.name
        size = image.size
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # far larger than any model's input
        if image.size != size:
            print(f"{path.name} is large: it is sent with {image.width}x{image.height} pixels", file=sys.stderr)
        name = f"{path.stem}.png"
    image.save(png, "PNG")
    return png.getvalue(), name


def save_video(videos, path, fps):
    """Save frames [T, H, W, 3] in 0..1 to the MP4 file `path`, like the Save Video node."""
    if "stillmotion" not in sys.modules:
        inprocess.import_pack(host.find_host().comfyui)
    from stillmotion.nodes.common import video
    video.save_video(videos, path, fps)
