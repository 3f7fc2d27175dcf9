"""The pack in a real ComfyUI server, over HTTP, as a browser or a script sees it."""

import io
import json
import shutil
from pathlib import Path

import av
import graph
import host
import pytest
from client import JobError
from core_calls import lossless_frames
from safetensors import safe_open
from safetensors.torch import save_file
from stillmotion.nodes import NODES

API_GRAPHS = sorted((host.WORKFLOWS / "api").glob("*.json"))
ANIMATE = host.WORKFLOWS / "api" / "animate.json"
FEW_STEPS = 5


def frames_of(client, entry):
    with client.view(entry) as answer:
        with av.open(io.BytesIO(answer.read())) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_every_node_is_registered(client):
    found = [name for name in client.json("/object_info") if name.startswith("Stillmotion_")]
    assert len(found) == len(NODES)


def test_every_template_is_listed(client):
    ours = sorted(path.stem for path in host.WORKFLOWS.glob("*.json"))
    assert sorted(client.json("/workflow_templates").get("stillmotion", [])) == ours


def test_every_template_and_its_api_graph_have_the_same_nodes():
    templates = {path.stem for path in host.WORKFLOWS.glob("*.json")}
    photos = {name for name in templates if name.startswith("photo_")}  # for models that have to be downloaded
    assert photos and templates - photos == {path.stem for path in API_GRAPHS}
    for path in API_GRAPHS:
        api = {i: node["class_type"] for i, node in json.loads(path.read_text()).items()}
        ui = {str(node["id"]): node["type"] for node in json.loads((host.WORKFLOWS / path.name).read_text())["nodes"]}
        assert {i: kind for i, kind in ui.items() if "Note" not in kind} == api, path.stem


@pytest.mark.parametrize("path", API_GRAPHS, ids=lambda path: path.stem)
def test_every_api_graph_runs_with_the_demo(client, path):
    job = json.loads(path.read_text())
    for node in job.values():
        if isinstance(node["inputs"].get("steps"), int):
            node["inputs"]["steps"] = 20 if node["class_type"] == "Stillmotion_TrainVideoModel" else FEW_STEPS
    progress = []
    outputs = client.run(job, progress=lambda *step: progress.append(step))
    assert any(maximum >= FEW_STEPS for _, _, maximum in progress)
    assert outputs
    videos = [outputs[i]["images"][0] for i, node in job.items() if node["class_type"] == "Stillmotion_SaveVideo"]
    for entry in videos:
        frames = frames_of(client, entry)
        side = 96 if "demo, 96x96" in path.read_text() else 64
        assert len(frames) >= 15 and frames[0].shape == (side, side, 3)
        assert frames[0].std() > 5  # a picture, not a uniform background


def test_a_folder_becomes_a_list_of_videos_named_after_its_pictures(client):
    job = json.loads((host.WORKFLOWS / "api" / "folder.json").read_text())
    job[graph.find_node(job, "Stillmotion_DDIMSampler")]["inputs"]["steps"] = 1
    job[graph.find_node(job, "Stillmotion_ImagePromptFolder")]["inputs"]["limit"] = 0
    entries = client.run(job)[graph.find_node(job, "Stillmotion_SaveVideo")]["images"]
    assert [entry["filename"].rsplit("_", 2)[0] for entry in entries] == ["blue_square", "green_triangle",
                                                                          "yellow_circle"]
    first = [frames_of(client, entry)[0].astype(int) for entry in entries]
    assert abs(first[0] - first[1]).mean() > 20 and abs(first[1] - first[2]).mean() > 20


def test_the_saved_video_carries_the_workflow(client):
    job = json.loads(ANIMATE.read_text())
    job[graph.find_node(job, "Stillmotion_DDIMSampler")]["inputs"]["steps"] = 1
    workflow = {"nodes": [], "links": [], "version": 0.4, "extra": {"note": "drop me"}}
    outputs = client.run(job, workflow)
    entry = outputs[graph.find_node(job, "Stillmotion_SaveVideo")]["images"][0]
    with client.view(entry) as answer:
        with av.open(io.BytesIO(answer.read())) as container:
            tags = dict(container.metadata)
    assert json.loads(tags["workflow"]) == workflow
    assert json.loads(tags["prompt"]) == job  # without ComfyUI's own note on cached nodes


def test_interrupt_stops_at_once_and_the_server_goes_on(client):
    job = json.loads(ANIMATE.read_text())
    sampler = job[graph.find_node(job, "Stillmotion_DDIMSampler")]["inputs"]
    sampler["steps"] = 1000
    seen = []

    def interrupt_after_three_steps(node, value, maximum):
        if value >= 3 and maximum == 1000:
            if not seen:
                client.json("/interrupt", {})
            seen.append(value)

    with pytest.raises(JobError, match="interrupted"):
        client.run(job, progress=interrupt_after_three_steps)
    # the step in flight, plus delayed messages: newer releases report steps at most ten times per second
    assert seen[-1] < seen[0] + 50
    sampler["steps"] = 1
    assert client.run(job)


def test_cancel_takes_a_waiting_job_off_the_queue(client):
    job = json.loads(ANIMATE.read_text())
    job[graph.find_node(job, "Stillmotion_DDIMSampler")]["inputs"]["steps"] = 1000
    running = client.queue(job)
    job[graph.find_node(job, "Stillmotion_DDIMSampler")]["inputs"]["seed"] = 7
    waiting = client.queue(job)
    client.cancel(waiting)
    queue = client.json("/queue")
    assert [entry[1] for entry in queue["queue_running"] + queue["queue_pending"]] == [running]
    client.cancel(running)


LOADER, I2V, SAMPLER, SAVER = ("Stillmotion_" + name for name in (
    "LoadDynamiCrafter", "DynamiCrafterImageToVideo", "DDIMSampler", "SaveVideo"))


@pytest.mark.parametrize("class_type, inputs, words", [
    (SAMPLER, {"steps": -1}, "smaller than min"),
    (SAMPLER, {"steps": 1001}, "bigger than max"),
    (SAMPLER, {"spacing": "sideways"}, "uniform_trailing"),
    (SAMPLER, {"clip_x0": "often"}, "dynamic"),
    (SAMPLER, {"tables": "mine"}, "original"),
    (SAMPLER, {"latent": ["2", 0]}, "mismatch"),
    (I2V, {"frames": 0}, "smaller than min"),
    (I2V, {"width": 60}, "64"),
    (I2V, {"mode": "interpolate"}, "image2"),
    (I2V, {"image2": ["2", 0]}, "interpolate"),
    (I2V, {"mode": "dance"}, "loop"),
    (LOADER, {"checkpoint": "missing.ckpt"}, "missing.ckpt"),
    (LOADER, {"variant": "2048"}, "512_interp"),
    (LOADER, {"weight_dtype": "int3"}, "bf16"),
    (SAVER, {"format": "avi"}, "gif"),
    (SAVER, {"fps": 0.0}, "smaller than min"),
    (SAVER, {"filename_prefix": "../../outside"}, "output folder"),
])
def test_bad_input_is_refused_in_words(client, class_type, inputs, words):
    job = json.loads(ANIMATE.read_text())
    job[graph.find_node(job, SAMPLER)]["inputs"]["steps"] = 1
    job[graph.find_node(job, class_type)]["inputs"].update(inputs)
    with pytest.raises(JobError) as error:
        client.run(job)
    assert words in str(error.value)


def test_a_wrong_second_graph_does_not_hide_behind_a_good_first(client):
    job = json.loads(ANIMATE.read_text())
    saver = graph.find_node(job, SAVER)
    job["bad"] = {"class_type": SAVER, "inputs": {**job[saver]["inputs"], "fps": 0.0}}
    with pytest.raises(JobError, match="node bad"):
        client.run(job)


def test_files_that_are_not_checkpoints_are_refused(server, client):
    folder = Path(server.base) / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.ckpt").write_text("this is not a checkpoint")
    job = json.loads(ANIMATE.read_text())
    job[graph.find_node(job, LOADER)]["inputs"]["checkpoint"] = "notes.ckpt"
    with pytest.raises(JobError, match="notes.ckpt"):
        client.run(job)


def test_demo_is_only_a_path(server, client):
    """The same file under another name in models/checkpoints gives identical frames."""
    folder = Path(server.base) / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    demo = host.PACK / "nodes" / "demo" / "dynamicrafter_demo.safetensors"
    shutil.copy(demo, folder / "renamed.safetensors")
    clips = []
    for name in ("demo", "renamed.safetensors"):
        job = json.loads(ANIMATE.read_text())
        job[graph.find_node(job, LOADER)]["inputs"]["checkpoint"] = name
        job[graph.find_node(job, SAMPLER)]["inputs"]["steps"] = 3
        clips.append(lossless_frames(client, job))
    assert (clips[0] == clips[1]).all()


def test_a_pruned_file_names_the_loaders_to_use(server, client):
    folder = Path(server.base) / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    demo = host.PACK / "nodes" / "demo" / "dynamicrafter_demo.safetensors"
    with safe_open(demo, "pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(("cond_stage_", "embedder."))}
        save_file(kept, folder / "pruned.safetensors", file.metadata())
    job = json.loads(ANIMATE.read_text())
    job[graph.find_node(job, LOADER)]["inputs"]["checkpoint"] = "pruned.safetensors"
    with pytest.raises(JobError, match="holds no text encoder.*Use core's Load CLIP"):
        client.run(job)


def test_an_upload_replaces_no_other_file(client):
    pictures = [(host.WORKFLOWS / "examples" / f"stillmotion_{name}.png").read_bytes() for name in ("start", "star")]
    names = [client.upload(picture, "same_name.png") for picture in (*pictures, pictures[0])]
    assert names[0] != names[1] and names[2] == names[0]
