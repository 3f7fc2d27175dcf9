"""The causal Wan workflows in a real ComfyUI server: progress, prompts in turn, interrupt and resume, bad input."""

import io
import json
import shutil
from pathlib import Path

import av
import graph
import host
import numpy as np
import pytest
import torch
from client import JobError
from core_calls import SAVER
from core_calls import lossless_frames as run
from safetensors.torch import save_file

LOADER, I2V, TIMELINE, SAMPLER, TO_FILE = ("Stillmotion_" + name for name in (
    "LoadCausalWan", "CausalWanImageToVideo", "PromptTimeline", "BlockAutoregressiveSampler",
    "BlockAutoregressiveToFile"))
FRAMES, BLOCK, STEPS = 32, 4, 4  # as in the shipped graphs


def shipped(name):
    return json.loads((host.WORKFLOWS / "api" / f"causal_{name}.json").read_text())


def inputs(job, class_type):
    return job[graph.find_node(job, class_type)]["inputs"]


def test_progress_counts_the_steps_of_all_blocks(client):
    job, seen = shipped("image_to_video"), []
    assert run(client, job, lambda *step: seen.append(step)).shape == (FRAMES, 96, 96, 3)
    values = [(value, maximum) for node, value, maximum in seen if job[node]["class_type"] == SAMPLER]
    assert {maximum for _, maximum in values} == {FRAMES // BLOCK * STEPS}
    assert values[-1][0] == FRAMES // BLOCK * STEPS


def test_a_prompt_holds_until_the_next_one_begins(client):
    straight, turning = shipped("long_video"), shipped("long_video")
    del inputs(straight, SAMPLER)["timeline"]
    straight, turning = run(client, straight), run(client, turning)
    assert (straight[:16] == turning[:16]).all() and (straight[16:] != turning[16:]).any()


def test_a_continued_clip_begins_with_its_last_frames(client):
    frames = run(client, shipped("continue"))
    path = host.WORKFLOWS / "examples" / "stillmotion_clip.mp4"
    with av.open(str(path)) as container:
        clip = np.stack([frame.to_ndarray(format="rgb24", width=96, height=96)
                         for frame in container.decode(video=0)])
    assert len(frames) == FRAMES
    for known, made in zip(clip[8:], frames):
        assert np.abs(known.astype(int) - made).mean() < 5


def test_an_interrupted_run_goes_on_bit_for_bit_and_other_settings_are_refused(server, client):
    whole = shipped("resume")
    inputs(whole, SAMPLER)["resume_folder"] = ""
    whole = run(client, whole)
    job, steps = shipped("resume"), []
    inputs(job, SAMPLER)["resume_folder"] = "runs/server_test"
    sampler = graph.find_node(job, SAMPLER)

    asked = []

    def interrupt_in_the_third_block(node, value, maximum):
        if node == sampler and value > 2 * STEPS and not asked:  # newer releases skip some steps
            asked.append(value)
            client.json("/interrupt", {})

    with pytest.raises(JobError, match="interrupted"):
        client.run(job, progress=interrupt_in_the_third_block)
    kept = sorted((Path(server.base) / "output" / "runs" / "server_test").iterdir())
    assert 2 <= len(kept) < FRAMES // BLOCK
    before = [path.read_bytes() for path in kept]

    other = json.loads(json.dumps(job))
    inputs(other, SAMPLER)["shift"] = 3.0
    with pytest.raises(JobError, match="blocks of another run.*shift was 5.0, now it is 3.0"):
        client.run(other)

    frames = run(client, job, lambda node, value, _: steps.append(value) if node == sampler else None)
    assert (frames == whole).all()
    assert [path.read_bytes() for path in kept] == before
    assert len(set(steps)) <= FRAMES // BLOCK * STEPS - 2 * STEPS + 1


def test_straight_to_a_file(client):
    job = shipped("image_to_video")
    expected = run(client, job)
    sampler, saver = graph.find_node(job, SAMPLER), graph.find_node(job, SAVER)
    for node in (saver, "7"):
        del job[node]
    job[sampler]["class_type"] = TO_FILE
    job[sampler]["inputs"] |= {"length": 0, "filename_prefix": "video/to_file", "fps": 8.0, "crf": 16}
    entry, = client.run(job)[sampler]["images"]
    with client.view(entry) as answer, av.open(io.BytesIO(answer.read())) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert json.loads(container.metadata["prompt"]).keys() == job.keys()
    assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected).mean() < 3


def test_demo_is_only_a_path(server, client):
    folder = Path(server.base) / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(host.PACK / "nodes" / "demo" / "causal_wan_demo.safetensors", folder / "another_name.safetensors")
    clips = []
    for name in ("demo", "another_name.safetensors"):
        job = shipped("image_to_video")
        inputs(job, LOADER)["checkpoint"] = name
        inputs(job, I2V)["length"] = 8
        clips.append(run(client, job))
    assert (clips[0] == clips[1]).all()


@pytest.mark.parametrize("class_type, given, words", [
    (LOADER, {"checkpoint": "missing.pt"}, "missing.pt"),
    (LOADER, {"lora": "missing.safetensors"}, "missing.safetensors"),
    (LOADER, {"weights": "best"}, "ema"),
    (LOADER, {"weight_dtype": "int3"}, "bf16"),
    (I2V, {"mechanism": "zoom"}, "still chunk"),
    (I2V, {"length": 30}, "28 or 32"),
    (I2V, {"width": 72}, "64 or 80"),
    (I2V, {"clip_vision": None}, "Connect clip_vision"),
    (TIMELINE, {"prompts": "16: a circle\n0: a square"}, "in order"),
    (TIMELINE, {"prompts": "40: a circle"}, "0 to 31"),
    (SAMPLER, {"steps": "fast"}, "whole numbers"),
    (SAMPLER, {"block": 8}, "blocks of 4"),
    (SAMPLER, {"window": 6}, "at least 8"),
    (SAMPLER, {"model": ["2", 0]}, "Load Causal Wan"),
    (SAMPLER, {"latent": ["2", 0]}, "mismatch"),
    (SAMPLER, {"resume_folder": "../outside"}, "output folder"),
])
def test_bad_input_is_refused_in_words(client, class_type, given, words):
    job = shipped("long_video")
    inputs(job, class_type).update(given)
    for name, value in given.items():
        if value is None:  # an unset input
            del inputs(job, class_type)[name]
    with pytest.raises(JobError) as error:
        client.run(job)
    assert words in str(error.value)


def test_a_lora_that_matches_nothing_is_refused(server, client):
    folder = Path(server.base) / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.elsewhere.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"},
              folder / "foreign.safetensors")
    job = shipped("image_to_video")
    inputs(job, LOADER)["lora"] = "foreign.safetensors"
    with pytest.raises(JobError, match="none of its .* keys is a LoRA for this model"):
        client.run(job)
