"""Prompts sent to a running sampler over HTTP, and the command that does so from a terminal."""
import json
import re
import signal
import subprocess
import sys
import time
import uuid
from threading import Thread

import av
import graph
import host
import numpy as np
import pytest
from client import BadStatus
from core_calls import SAVER, lossless_frames

SAMPLER, TO_FILE = "Stillmotion_BlockAutoregressiveSampler", "Stillmotion_BlockAutoregressiveToFile"
UP = "a red circle moves up on a white background"
TEXT = {"Content-Type": "text/plain"}
JSON = {"Content-Type": "application/json"}


def shipped():
    """The image-to-video graph with a text encoder at its sampler, and a second sampler that repeats its prompts."""
    job = json.loads((host.WORKFLOWS / "api" / "causal_image_to_video.json").read_text())
    sampler, decoder, saver = (graph.find_node(job, kind) for kind in (SAMPLER, "VAEDecode", SAVER))
    job["again"] = json.loads(json.dumps(job[sampler]))
    job["again"]["inputs"]["timeline"] = [sampler, 2]
    job[sampler]["inputs"]["clip"] = ["2", 1]
    for kind in (decoder, saver):
        job[f"{kind} again"] = json.loads(json.dumps(job[kind]))
    job[f"{decoder} again"]["inputs"]["samples"] = ["again", 0]
    job[f"{saver} again"]["inputs"] |= {"images": [f"{decoder} again", 0], "latent": ["again", 0]}
    return job, sampler


def test_a_prompt_that_is_sent_while_it_runs_is_repeated_from_the_timeline(client):
    job, sampler = shipped()
    for name in [name for name in job if job[name]["class_type"] == SAVER]:
        job[name]["inputs"]["format"] = "png frames"
    prompt_id, answers = str(uuid.uuid4()), []

    def send(node, value, maximum):
        if node == sampler and value >= 4 and not answers:
            run = {"prompt_id": prompt_id, "node_id": sampler}
            for body in ({**run, "text": UP}, {**run, "text": ""}, {**run, "node_id": "99", "text": UP}):
                answers.append(ask(client, "steer", body))

    outputs = client.run(job, progress=send, prompt_id=prompt_id)
    good, empty, other = answers
    assert good["block"] >= 2 and "begins with block" in good["message"]
    assert empty == (400, "text must be text and not empty: send "
                          '{"prompt_id": "...", "node_id": "...", "text": "..."}.')
    assert other[0] == 404 and "takes no messages" in other[1]
    late = ask(client, "steer", {"prompt_id": prompt_id, "node_id": sampler, "text": UP})
    assert late[0] == 409 and "this run has ended" in late[1]
    first, again = (frames_of(client, outputs[name]["images"]) for name in job if job[name]["class_type"] == SAVER)
    assert (first == again).all()
    plain = lossless_frames(client, json.loads((host.WORKFLOWS / "api" / "causal_image_to_video.json").read_text()))
    begins = 4 * (good["block"] - 1)
    assert (first[:begins] == plain[:begins]).all() and (first[begins:] != plain[begins:]).any()


def frames_of(client, entries):
    from PIL import Image
    return np.stack([np.array(Image.open(client.view(entry)).convert("RGB")) for entry in entries])


def ask(client, path, body, headers=None):
    """The answer's JSON, or (status, error)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        return json.loads(client.request(f"/stillmotion/{path}", data, headers or JSON).read())
    except BadStatus as error:
        return error.code, json.loads(error.text)["error"] if error.text.startswith("{") else error.text


@pytest.mark.parametrize("path, body, headers, status, words", [
    ("steer", {"prompt_id": "a", "node_id": "6", "text": UP}, JSON, 404, "has not begun"),
    ("steer", {"prompt_id": "a", "node_id": 6, "text": UP}, JSON, 400, "node_id must be text"),
    ("steer", b"[]", JSON, 400, "not a JSON object"),
    ("steer", b"{", JSON, 400, "not a JSON object"),
    ("stop", {"prompt_id": "a"}, JSON, 400, "node_id must be text"),
    ("watch", {"client_id": "a", "form": "gif"}, JSON, 400, "allowed are frames and mp4"),
    ("steer", {"prompt_id": "a", "node_id": "6", "text": UP}, TEXT, 415, "Send JSON"),
    ("steer", {"prompt_id": "a", "node_id": "6", "text": UP}, {**JSON, "Sec-Fetch-Site": "cross-site"}, 403, ""),
    ("steer", {"prompt_id": "a", "node_id": "6", "text": UP}, {**JSON, "Origin": "http://elsewhere.example"}, 403, ""),
    ("stop", {"prompt_id": "a", "node_id": "6"}, {**JSON, "Origin": "http://127.0.0.1:1"}, 403, ""),
], ids=str)
def test_bad_and_foreign_messages_are_refused(client, path, body, headers, status, words):
    code, text = ask(client, path, body, headers)
    assert code == status and words in text


def command(client, folder, *arguments):
    # a test run in the background ignores SIGINT, and its children inherit that
    listen = None if sys.platform == "win32" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, str(host.WORKFLOWS / "run.py"), "live", "--server", client.url, "--output",
                             str(folder), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, preexec_fn=listen)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_the_command_saves_blocks_takes_prompts_and_ends_on_interrupt(client, tmp_path):
    with command(client, tmp_path) as running:
        Thread(target=lambda: (time.sleep(400), running.kill()), daemon=True).start()
        lines = []
        for line in running.stdout:
            lines.append(line)
            if line.startswith("block 2: "):
                running.stdin.write(UP + "\n")
                running.stdin.flush()
            if "begins with: " in line:
                running.send_signal(signal.SIGINT)
        assert running.wait(100) == 0, "".join(lines)
    text = "".join(lines)
    blocks = re.findall(r"block (\d+): frames (\d+) to (\d+)", text)
    assert [int(number) for number, _, _ in blocks] == list(range(1, len(blocks) + 1))
    files = sorted(tmp_path.glob("live_seed123/block_*.mp4"))
    counts = [count_frames(path) for path in files]
    assert counts == [int(last) - int(first) + 1 for _, first, last in blocks]
    assert count_frames(tmp_path / "live_seed123.mp4") == sum(counts)
    start, sent = text.splitlines()[-1].split(": ", 1)
    assert sent == UP and int(start) % 4 == 0 and "begins with block" in text

    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{start}: {UP}\n")
    with command(client, tmp_path, "--prompts", str(prompts), "--frames", str(sum(counts))) as again:
        told, _ = again.communicate(timeout=400)
    assert again.returncode == 0, told
    first, second = (pixels(tmp_path / f"{name}.mp4") for name in ("live_seed123", "live_seed123-2"))
    assert first.shape == second.shape and np.abs(first.astype(int) - second).mean() < 1


def count_frames(path):
    return len(pixels(path))


def pixels(path):
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
