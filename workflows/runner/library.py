"""The library: DynamiCrafter's image-to-video as a Python object, in any Python from 3.11 on.

ComfyUI runs in its own Python and environment (see host.py); this module talks to it over the pipes of a child process
(library_work.py), so it needs no package but torch, numpy and Pillow, and adds no modules to the caller's.
"""

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from . import host

RESOLUTIONS = {"256_256": "256", "512_512": "512", "1024_1024": "1024", "demo": "demo"}  # name: preset of run.py
STOP_SECONDS = 20  # for the child to cancel its job and stop its ComfyUI
WORK = host.RUNNER / "library_work.py"


class VideoError(RuntimeError):
    """No video was made; the message says why and what to do."""


class DynamiCrafterImg2VideoPipeline:
    """DynamiCrafter (arXiv 2310.12190) on a ComfyUI that is set up on first use: pictures and prompts become videos.

    resolution: "256_256", "512_512" or "1024_1024", the models made for 256x256, 512x320 and 1024x576 pixels; "demo" is
    the pack's own small model, which knows drawn pictures only. device: "cuda:N", "cpu", or "auto". checkpoint: a file,
    or a name in models/checkpoints; by default the model's file is looked for there. comfyui: folder of a ComfyUI to
    use instead of the private one. server: the address of a running ComfyUI with this pack, or a list of several: `map`
    works on all of them, a call on the first; with it device, comfyui and models have no effect. models: one more
    models folder to search.

    Use it as a context manager, or call close(); otherwise the ComfyUI ends with the program. Raises VideoError if
    ComfyUI does not start or the checkpoint is missing, ValueError for an unknown resolution.
    """

    def __init__(self, resolution="512_512", device="cuda:0", checkpoint=None, comfyui=None, server=None, models=None):
        if resolution not in RESOLUTIONS:
            raise ValueError(f"resolution = {resolution!r} was given; allowed are {', '.join(RESOLUTIONS)}.")
        servers = [server] if isinstance(server, str) else list(server or ())
        if not servers and device.startswith("cuda") and comfyui is None and not host.has_nvidia():
            raise VideoError(f"device = {device!r} was given, and this machine has no NVIDIA driver. Use device='cpu', "
                             "which is slow, or server= with the address of a ComfyUI on another machine.")
        self.resolution, self.preset, self.checkpoint = resolution, RESOLUTIONS[resolution], checkpoint
        own = {} if servers else {"device": device, "models": models and str(models)}
        self._python, self._environment = python_for(servers, comfyui)
        self._process = subprocess.Popen(
            [self._python, str(WORK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            start_new_session=True, env=self._environment)
        self._close = weakref.finalize(self, stop, self._process)
        try:
            answer = self._ask(resolution=self.preset, checkpoint=checkpoint and str(checkpoint),
                               server=servers[0] if servers else None, **own)
        except BaseException:
            self.close()
            raise
        self._servers = servers or [answer["url"]]

    def __call__(self, image, prompt, negative_prompt="", num_inference_steps=50, guidance_scale=None, eta=1.0,
                 frame_stride=None, num_frames=16, height=None, width=None, return_dict=True, seed=123):
        """Animate an image; returns {"videos": v}, or with return_dict False (v,).

        v: float32 [1, 3, num_frames, height, width] in 0..1. image: a file or a PIL image, scaled and cropped to the
        video's size. guidance_scale: default 7.5 (demo 1.5). frame_stride: 256_256: larger moves more (default 3);
        the others: frames per second, smaller moves more (24 and 10). height, width: by default those that the model
        was made for. Raises VideoError: a picture that cannot be read, a value out of range, too little memory.
        """
        import numpy
        import torch

        with tempfile.TemporaryDirectory(prefix="stillmotion-library-") as folder:
            result = Path(folder, "frames.npy")
            self._ask(image=picture_file(image, folder), result=str(result), prompt=prompt, frames=num_frames,
                      negative_prompt=negative_prompt, seed=seed, steps=num_inference_steps, eta=eta,
                      guidance_scale=guidance_scale, frame_stride=frame_stride, width=width, height=height)
            frames_THWC = torch.from_numpy(numpy.load(result))
        videos_BCTHW = (frames_THWC.movedim(-1, 0)[None].float() / 255).contiguous()
        return {"videos": videos_BCTHW} if return_dict else (videos_BCTHW,)

    def map(self, images, prompts, output="results/library", negative_prompt="", num_inference_steps=50,
            guidance_scale=None, eta=1.0, frame_stride=None, num_frames=16, height=None, width=None, seed=123, fps=8,
            retries=2):
        """Animate many images on all servers; returns the paths of their MP4 files in `output`, in the order given.

        images: files or PIL images; prompts: as many, or one text for all; the rest as in a call. The jobs are a batch
        of run.py: the list is on disk, a lost server's jobs go to the others, and the same call again makes only what
        is not there yet. Raises VideoError with the names of those that failed, when all others are done.
        """
        images = list(images)
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts were given: give as many, or one text.")
        if not images:
            return []
        output = Path(output).absolute()
        flags = {"--negative_prompt": negative_prompt, "--steps": num_inference_steps, "--eta": eta, "--seed": seed,
                 "--guidance_scale": guidance_scale, "--frame_stride": frame_stride, "--frames": num_frames,
                 "--height": height, "--width": width, "--fps": fps, "--checkpoint": self.checkpoint}
        flags = [f"{name}={value}" for name, value in flags.items() if value is not None]
        with tempfile.TemporaryDirectory(prefix="stillmotion-library-") as private:
            found = [job_of(image, prompt, [self.preset, *flags], private) for image, prompt in zip(images, prompts)]
            names = [name for name, _, _ in found]
            # beside the list, where a batch that was stopped finds them again
            pictures = output.with_name(f"{output.name}.pictures") / digest("\n".join(names).encode())
            pictures.mkdir(parents=True, exist_ok=True)
            for (name, picture, suffix), prompt in zip(found, prompts):
                (pictures / f"{name}{suffix}").write_bytes(picture)
                (pictures / f"{name}.txt").write_text(prompt, encoding="utf-8")
            workers = Path(private, "workers.txt")  # a file: others on this machine can read a command's arguments
            workers.write_text("\n".join(self._servers))
            self._batch([self.preset, f"--prompt_dir={pictures}", f"--output={output}", f"--workers={workers}",
                         f"--retries={retries}", "--json", *flags])
        shutil.rmtree(pictures)
        with contextlib.suppress(OSError):  # pictures of a batch that failed stay for `run.py retry`
            pictures.parent.rmdir()
        return [output / f"{name}.mp4" for name in names]

    def _batch(self, arguments):
        """Run run.py; raises VideoError with the failures that it names."""
        done = subprocess.Popen([self._python, str(host.WORKFLOWS / "run.py"), *arguments], stdout=subprocess.PIPE,
                                text=True, encoding="utf-8", env=self._environment)
        try:
            text, _ = done.communicate()
        except BaseException:
            done.terminate()
            done.wait()
            raise
        if done.returncode:
            found = json.loads((text.splitlines() or ["{}"])[-1])
            failures = [f"{job['name']}: {job['error']}" for job in found.get("failures", ())]
            raise VideoError("\n".join([f"{len(failures)} videos failed" if failures else
                                        found.get("error", "the batch did not end; its last words are above"),
                                        *failures]))

    def _ask(self, **values):
        """Send one request to the child and wait; whatever ends the wait early stops the child and its job."""
        if self._process.poll() is not None:
            raise VideoError("the pipeline is closed: make a new one.")
        try:
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BaseException:
            self.close()
            raise
        if not line:
            self.close()
            raise VideoError(f"the process that talks to ComfyUI ended (exit code {self._process.returncode}); its "
                             "last words are above.")
        answer = json.loads(line)
        if "error" in answer:
            raise VideoError(answer["error"])
        return answer

    def close(self):
        """Stop the ComfyUI that the pipeline started."""
        self._close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def job_of(image, prompt, settings, folder):
    """(name of the video, bytes of the picture, their suffix); the name tells picture, prompt and settings apart."""
    path = Path(picture_file(image, folder))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror}.") from None
    stem = re.sub(r"\W", "_", path.stem[:40])
    return f"{stem}_{digest(data, prompt.encode(), *(text.encode() for text in settings))}", data, path.suffix


def digest(*parts):
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def python_for(servers, comfyui):
    """(Python, environment) for the child: ComfyUI's, or the running one if it is to talk to a server only and can."""
    if servers and all(map(find_spec, ("aiohttp", "numpy", "PIL"))):
        return sys.executable, None
    try:
        found = host.find_host(comfyui)
    except host.HostError as error:
        raise VideoError(str(error)) from None
    return str(found.python), host.environment_in(found)


def stop(process):
    """End the child, which cancels its job and stops its ComfyUI."""
    with contextlib.suppress(OSError):  # the child may be gone already
        process.stdin.close()
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def picture_file(image, folder):
    """The absolute path of an image: a file as it is, a PIL image saved without loss in the folder."""
    if isinstance(image, (str, Path)):
        return str(Path(image).expanduser().absolute())
    if not hasattr(image, "save"):
        raise ValueError(f"image is a {type(image).__name__}: give the path of a file, or a PIL image.")
    path = Path(folder, "image.png")
    image.save(path)
    return str(path)


def save_video(videos, path, fps=8):
    """Save a pipeline's videos [1, 3, T, H, W], or frames [T, H, W, 3], in 0..1, as the MP4 file `path` (H.264).

    An existing file is replaced, whole or not at all. Raises ValueError for several videos, invalid frames or fps, and
    OSError if the file cannot be written.
    """
    video = import_module(f"{__package__.removesuffix('workflows.runner')}nodes.common.video")
    if videos.ndim == 5:
        if len(videos) != 1:
            raise ValueError(f"{len(videos)} videos were given for one file. Save each as videos[i:i + 1].")
        videos = videos[0].movedim(0, -1)
    video.save_video(videos, path, fps)
