"""workflows/run.py and the Python API, run as a user would."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import av
import client as http
import host
import launch
import numpy as np
import pipeline
import pytest
import torch
from PIL import Image

EXAMPLE = host.WORKFLOWS / "examples" / "stillmotion_star.png"


def hear_signals():
    """A test run in the background ignores Ctrl+C, one under nohup the end of its terminal; child processes inherit
    that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments, cwd, **environment):
    environment = dict(os.environ, PYTHONUNBUFFERED="1", **environment)
    listen = None if os.name == "nt" else hear_signals
    return subprocess.Popen([sys.executable, str(host.WORKFLOWS / "run.py"), *map(str, arguments)], cwd=cwd,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=listen)


def run(*arguments, cwd, **environment):
    process = start(*arguments, cwd=cwd, **environment)
    return process.communicate(timeout=300)[0], process.returncode


def until(process, words):
    """Read the output up to the first line that contains `words`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return line
    raise AssertionError(f"{words!r} never came:\n{''.join(lines)}")


def frames_and_tags(path):
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)], dict(container.metadata)


def test_one_command_makes_a_video(tmp_path):
    text, code = run("demo", "42", "--steps", "3", cwd=tmp_path)
    assert code == 0, text
    assert "DDIM Sampler (fixed): 3/3" in text
    path, = tmp_path.rglob("*.mp4")
    assert f"saved {path}" in text and path == tmp_path / "results" / "stillmotion_star_demo_seed42.mp4"
    frames, tags = frames_and_tags(path)
    assert len(frames) == 16 and frames[0].shape == (96, 96, 3)
    prompt, workflow = json.loads(tags["prompt"]), json.loads(tags["workflow"])
    sampler, = (node for node in prompt.values() if node["class_type"] == pipeline.SAMPLER)
    assert sampler["inputs"]["seed"] == 42 and sampler["inputs"]["steps"] == 3
    shown, = (node for node in workflow["nodes"] if node["type"] == pipeline.SAMPLER)
    assert 42 in shown["widgets_values"] and 3 in shown["widgets_values"]


def test_what_the_demo_does_not_know_is_said(server, tmp_path):
    """Of a prompt and a picture, on the terminal of whoever started it."""
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    text, code = run("--server", server.url, "--steps", "1", "--image", picture, "--prompt", "a cat", cwd=tmp_path)
    assert code == 0, text
    assert 'Stillmotion: This small model does not know "cat". It knows words such as a, an, background' in text
    assert "Stillmotion: The picture is nothing like what this small model knows" in text


def test_a_folder_of_prompts_in_batches_on_a_running_server(server, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("one", "two"):
        shutil.copy(EXAMPLE, folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a red circle moves up on a white background")
    text, code = run("demo", "--server", server.url, "--prompt_dir", folder, "--steps", "2", "--batch_size", "2",
                     "--frames", "8", "--fps", "4", cwd=tmp_path)
    assert code == 0, text
    made = sorted((tmp_path / "results" / "dynamicrafter_pipeline_demo_seed123").iterdir())
    assert [path.name for path in made] == ["one_0.mp4", "one_1.mp4", "two_0.mp4", "two_1.mp4"]
    clips = [frames_and_tags(path)[0] for path in made]
    assert [len(clip) for clip in clips] == [8] * 4
    # different noise; the difference is larger than x264's variation between runs
    assert abs(clips[0][4].astype(int) - clips[1][4]).mean() > 0.7


def test_a_preset_without_its_checkpoint_says_what_to_download(server, tmp_path):
    text, code = run("1024", "--server", server.url, cwd=tmp_path)
    assert code == 1 and "Doubiiu/DynamiCrafter_1024" in text and "checkpoints" in text and "Traceback" not in text


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    text, code = run("--server", server.url, "--steps", "1", "--output", tmp_path / "file", cwd=tmp_path)
    assert code == 1 and f"cannot write into {tmp_path / 'file'}" in text and "Traceback" not in text


def test_a_finished_video_is_kept_when_it_cannot_be_saved(tmp_path):
    process = start("--steps", "4", cwd=tmp_path)
    until(process, "ready")
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "results").write_text("in the way")
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "cannot save" in text and "Traceback" not in text
    folder = Path(re.search(r"kept in (.*)", text)[1])
    kept, = folder.rglob("*.mp4")
    assert len(frames_and_tags(kept)[0]) == 16
    shutil.rmtree(folder.parent)


def test_another_prompt_does_not_replace_the_first_video(server, tmp_path):
    arguments = ["--server", server.url, "--steps", "1", "--frames", "2", "--image", EXAMPLE, "--prompt"]
    for prompt in ("a red circle moves up", "\u732b"):  # the second one is outside the console's code page
        text, code = run(*arguments, prompt, cwd=tmp_path, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
        assert code == 0, text
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "stillmotion_star_demo_seed123.mp4", "stillmotion_star_demo_seed123-2.mp4"}
    assert "saved" in text and "-2.mp4" in text
    run(*arguments, "x", "--overwrite", cwd=tmp_path)
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_an_image_that_fails_does_not_stop_the_others(server, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    shutil.copy(EXAMPLE, folder / "good.png")
    for name in ("damaged", "deep", "good", "moving"):
        (folder / f"{name}.txt").write_bytes(b"\xef\xbb\xbfa red circle moves up")
    (folder / "damaged.png").write_bytes(EXAMPLE.read_bytes()[:200])
    Image.fromarray(np.full((64, 64), 3 * 257, np.uint16)).save(folder / "deep.png")
    pictures = [Image.new("RGB", (64, 64), (i * 40, 0, 0)) for i in range(3)]
    pictures[0].save(folder / "moving.gif", save_all=True, append_images=pictures[1:])
    (folder / "linked.png").symlink_to(folder / "nothing")
    text, code = run("--server", server.url, "--steps", "1", "--frames", "3", "--prompt_dir", folder, "--output",
                     tmp_path / "made", cwd=tmp_path)
    assert code == 1 and "2 of 4 videos failed" in text and "damaged.png is damaged" in text, text
    assert "deep.png is grey with 16 bits" in text
    assert "linked.png: a link to nothing" in text and "\ufeff" not in text and "Traceback" not in text
    made = {path.stem: frames_and_tags(path)[0] for path in (tmp_path / "made").iterdir()}
    assert {name: len(frames) for name, frames in made.items()} == {"good": 3, "moving": 3}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the process table of Linux")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_no_server_is_left_by_a_runner_that_ends_early(tmp_path, number):
    process = start("--steps", "1000", cwd=tmp_path)
    until(process, "/1000")
    child, = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
    folder = Path(command[command.index("--base-directory") + 1])
    process.send_signal(number)
    process.communicate(timeout=150)
    deadline = time.monotonic() + 100
    while folder.exists() or Path(f"/proc/{child}/cwd").exists():
        assert time.monotonic() < deadline, "the server lives on"
        time.sleep(0.1)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_the_job_and_the_server(tmp_path):
    process = start("--steps", "1000", cwd=tmp_path)
    url = until(process, "ready").split()[-1]
    until(process, "/1000")  # newer releases skip some steps
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=150)[0]
    assert process.returncode == 130 and "the job was cancelled" in text and "Traceback" not in text
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
    assert list(tmp_path.rglob("*.mp4*")) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_cancels_the_job_on_somebody_elses_server(server, client, tmp_path):
    process = start("--server", server.url, "--steps", "1000", cwd=tmp_path)
    until(process, "/1000")  # newer releases skip some steps
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=150)
    deadline = time.monotonic() + 100
    while client.json("/queue")["queue_running"]:
        assert time.monotonic() < deadline, "the job still runs"
        time.sleep(0.1)
    assert server.alive()


def test_a_server_that_dies_is_noticed():
    own = pipeline.Pipeline("demo")
    try:
        threading.Timer(3, own.server.process.kill).start()
        with pytest.raises(http.ServerGone, match="the ComfyUI server ended"):
            own.run(EXAMPLE, "a red circle moves up", steps=1000)
    finally:
        own.close()
    assert not Path(own.server.base).exists()


def test_a_pack_that_does_not_load_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "pack"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('a broken pack')")
    monkeypatch.setattr(host, "PACK", broken)
    with pytest.raises(host.HostError, match="(?s)did not load.*a broken pack"):
        launch.Server(host.find_host())


def test_the_python_call_gives_frames_that_can_be_saved(server, tmp_path):
    with pipeline.Pipeline(server=server.url) as call:
        videos = call(Image.open(EXAMPLE), "a red circle moves left", "", 2, 7.5, 0.0, None, 12, 64, 64)
    assert videos.shape == (12, 64, 64, 3) and videos.dtype == torch.float32
    assert 0 <= videos.min() and videos.max() <= 1
    pipeline.save_video(videos, tmp_path / "out.mp4", 8)
    frames, _ = frames_and_tags(tmp_path / "out.mp4")
    assert len(frames) == 12
