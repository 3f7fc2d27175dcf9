"""A server killed at random times: no partial file under a final name, and a rerun produces the same bytes."""
import copy
import io
import json
import os
import sys
import time
from pathlib import Path
from random import Random

import av
import client as http
import graph
import host
import launch
import pytest
import safetensors
from PIL import Image

pytestmark = pytest.mark.skipif("STILLMOTION_SERVER" in os.environ, reason="needs a server of its own")
SAVE, SAMPLER, TO_FILE, TRAIN = ("Stillmotion_" + name for name in (
    "SaveVideo", "BlockAutoregressiveSampler", "BlockAutoregressiveToFile", "TrainVideoModel"))


def shipped(name):
    return json.loads((host.WORKFLOWS / "api" / f"{name}.json").read_text())


def saving():
    """Two save nodes with a clip that takes a while to write; no model."""
    made = {"1": {"class_type": "LoadImage", "inputs": {"image": "stillmotion_start.png"}},
            "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "upscale_method": "bilinear", "width": 512,
                                                         "height": 512, "crop": "disabled"}},
            "3": {"class_type": "RepeatImageBatch", "inputs": {"image": ["2", 0], "amount": 40}}}
    for node, form in (("4", "mp4"), ("5", "png frames")):
        made[node] = {"class_type": SAVE, "inputs": {"images": ["3", 0], "filename_prefix": "kill/save", "fps": 8.0,
                                                     "format": form, "crf": 16}}
    return made


def to_file():
    made = shipped("causal_text_to_video")
    node, decode = graph.find_node(made, SAMPLER), made.pop(graph.find_node(made, "VAEDecode"))
    del made[graph.find_node(made, SAVE)]
    made[node] = {"class_type": TO_FILE, "inputs": {**made[node]["inputs"], "vae": decode["inputs"]["vae"], "length": 0,
                                                    "filename_prefix": "kill/to_file", "fps": 16.0, "crf": 16,
                                                    "resume_folder": "kill/blocks"}}
    return made


def resume():
    made = shipped("causal_resume")
    made[graph.find_node(made, SAMPLER)]["inputs"]["resume_folder"] = "kill/runs"
    made[graph.find_node(made, SAVE)]["inputs"]["filename_prefix"] = "kill/resume"
    return made


def training():
    made = shipped("train")
    made = {node: made[node] for node in ("1", "2", "3")}
    made["2"]["inputs"]["count"] = 20
    made["3"]["inputs"].update(name="killed", steps=12, batch_size=1, model_channels=32, sample_every=3)
    return made


JOBS = {"save": saving, "to file": to_file, "resume": resume, "training": training}


class Killable:
    """A server that can be killed and restarted on the same folders."""

    def __init__(self):
        found = host.Host(Path(sys.executable), Path(os.environ["STILLMOTION_COMFYUI"]))
        self.server = launch.Server(found, "cpu", threads=1)
        self.client = http.Client(self.server.url, self.server)

    def kill_in(self, job, seconds):
        """Kill the server `seconds` after queueing this job."""
        self.client.queue(job)
        time.sleep(seconds)
        self.server.process.kill()
        self.server.process.wait()
        self.check_files()
        self.server._start()
        self.client = http.Client(self.server.url, self.server)

    def run(self, job):
        """The bytes of the job's saved files, in the order of its nodes."""
        outputs = self.client.run(job)
        if any(node["class_type"] == TRAIN for node in job.values()):
            with safetensors.safe_open(max(self.results(), key=lambda path: path.stat().st_mtime_ns), "np") as file:
                return [file.get_tensor(key).tobytes() for key in sorted(file.keys())]
        return [(self.server.base / "output" / entry["subfolder"] / entry["filename"]).read_bytes()
                for node in sorted(outputs) for entry in outputs[node].get("images", ()) if entry["type"] == "output"]

    def results(self):
        return list((self.server.base / "models").rglob("killed_*.safetensors"))

    def check_files(self):
        """Every file with a final name can be read to the end."""
        for path in [*(self.server.base / "output" / "kill").rglob("*"), *self.results()]:
            if path.is_dir() or any(part.startswith(".") for part in path.relative_to(self.server.base).parts):
                continue
            if path.suffix == ".safetensors":
                with safetensors.safe_open(path, "pt") as file:
                    assert [file.get_tensor(key) for key in file.keys()]
            elif path.suffix == ".mp4":
                with av.open(io.BytesIO(path.read_bytes())) as container:
                    assert "prompt" in container.metadata and list(container.decode(video=0))
            else:
                Image.open(path).load()

    def hidden(self):
        return [path for path in (self.server.base / "output" / "kill").rglob(".*")]


@pytest.fixture(scope="module")
def killable():
    made = Killable()
    yield made
    made.server.stop()


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_server_leaves_nothing_half_written_and_the_rerun_is_equal(killable, name, kills):
    job, random = JOBS[name](), Random(f"{name} {kills}")
    fresh = copy.deepcopy(job)
    for node in fresh.values():  # the same values, without stored blocks
        if "resume_folder" in node["inputs"]:
            node["inputs"]["resume_folder"] = ""
    began = time.monotonic()
    expected = killable.run(fresh)
    length = time.monotonic() - began
    for _ in range(kills):
        killable.kill_in(job, random.uniform(0.2, 1) * length)
    if name == "training":
        states = [path for path in (killable.server.base / "output" / "training").rglob("*") if path.is_file()]
        job["3"]["inputs"]["resume"] = any("state" in path.name for path in states)
    assert without_prompts(killable.run(job)) == without_prompts(expected)
    killable.check_files()
    assert killable.hidden() == []


def without_prompts(files):
    """Reduce MP4s to frames: the tags of two jobs differ in the resume folder's name; frames and weights do not."""
    return [frames(data) if data[4:8] == b"ftyp" else data for data in files]


def frames(data):
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]
