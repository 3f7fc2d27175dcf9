"""The library as a program uses it: the class and its call, and the examples on its page."""

import re
import signal
import subprocess
import sys
import time

import av
import host
import launch
import numpy as np
import pytest
import stillmotion
import torch
from PIL import Image

EXAMPLE = host.WORKFLOWS / "examples" / "stillmotion_start.png"
PAGE = host.PACK / "web" / "pages" / "library.md"
FEW = {"num_inference_steps": 2, "num_frames": 6}


def frames_of(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture
def pipeline(server):
    with stillmotion.DynamiCrafterImg2VideoPipeline("demo", server=server.url) as made:
        yield made


def test_a_picture_and_a_prompt_become_a_video(pipeline, tmp_path):
    prompt = "a red circle moves left on a white background"
    found = pipeline(EXAMPLE, prompt, negative_prompt="blur", eta=0.0, height=64, width=64, **FEW)
    videos = found["videos"]
    assert list(found) == ["videos"] and videos.shape == (1, 3, 6, 64, 64) and videos.dtype == torch.float32
    assert 0 <= videos.min() and videos.max() <= 1
    again, = pipeline(Image.open(EXAMPLE), prompt, "blur", 2, None, 0.0, None, 6, 64, 64, return_dict=False)
    assert torch.equal(videos, again)
    stillmotion.save_video(videos, tmp_path / "out.mp4", fps=8)
    frames = frames_of(tmp_path / "out.mp4")
    shown = (videos[0].movedim(0, -1) * 255).numpy()
    assert len(frames) == 6 and abs(np.stack(frames) - shown).mean() < 3
    with pytest.raises(ValueError, match="2 videos were given for one file"):
        stillmotion.save_video(videos.repeat(2, 1, 1, 1, 1), tmp_path / "two.mp4", 8)


def test_what_goes_wrong_is_said_and_the_pipeline_goes_on(pipeline, tmp_path):
    with pytest.raises(stillmotion.VideoError, match="nothing.png .*No such file"):
        pipeline(tmp_path / "nothing.png", "x")
    with pytest.raises(stillmotion.VideoError, match="Value -1 smaller than min of 0: steps"):
        pipeline(EXAMPLE, "x", num_inference_steps=-1)
    with pytest.raises(ValueError, match="image is a int: give the path of a file, or a PIL image"):
        pipeline(5, "x")
    assert pipeline(EXAMPLE, "x", **FEW)["videos"].isfinite().all()
    pipeline.close()
    with pytest.raises(stillmotion.VideoError, match="the pipeline is closed"):
        pipeline(EXAMPLE, "x")


def test_map_makes_the_same_videos_on_several_servers(pipeline, server, tmp_path):
    with launch.Server(host.find_host(), threads=1) as second:
        pipeline._servers.append(second.url)  # as server=[..., ...]
        images = [EXAMPLE, Image.open(EXAMPLE).rotate(90), EXAMPLE]
        prompts = ["a red circle moves left", "a red circle moves up", "a red circle moves left"]
        paths = pipeline.map(images, prompts, tmp_path / "out", seed=5, **FEW)
        assert len(set(paths)) == 2 and paths[0] == paths[2] and paths[0].name.startswith("stillmotion_start_")
        made = {path: path.read_bytes() for path in paths}
        assert pipeline.map(images, prompts, tmp_path / "out", seed=5, **FEW) == paths  # nothing is made again
        assert {path: path.read_bytes() for path in paths} == made
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.batch"]
    pipeline._servers.pop()
    assert pipeline.map(images[:1], prompts[0], tmp_path / "alone", seed=5, **FEW)[0].read_bytes() == made[paths[0]]
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        pipeline.map(images[:2], prompts[:1])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(stillmotion.VideoError, match="1 videos failed\nbad_.*is no picture"):
        pipeline.map([tmp_path / "bad.png", EXAMPLE], "x", tmp_path / "out", retries=0, **FEW)
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3


def test_a_pipeline_that_cannot_be_made_says_why(server, monkeypatch):
    with pytest.raises(ValueError, match="'576_1024' was given; allowed are 256_256, 512_512, 1024_1024, demo"):
        stillmotion.DynamiCrafterImg2VideoPipeline("576_1024")
    with pytest.raises(stillmotion.VideoError, match="Doubiiu/DynamiCrafter_1024"):
        stillmotion.DynamiCrafterImg2VideoPipeline("1024_1024", server=server.url)
    monkeypatch.setattr(stillmotion.workflows.runner.host, "has_nvidia", lambda: False)
    with pytest.raises(stillmotion.VideoError, match="this machine has no NVIDIA driver. Use device='cpu'"):
        stillmotion.DynamiCrafterImg2VideoPipeline()


OWN = f"""
from workflows.runner.library import DynamiCrafterImg2VideoPipeline
pipeline = DynamiCrafterImg2VideoPipeline("demo", device="cpu")
print("ready", flush=True)
pipeline({str(EXAMPLE)!r}, "a red circle moves left", num_inference_steps=1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process table of Linux")
@pytest.mark.parametrize("number", [
    pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_nothing_is_left_by_a_program_that_ends_early(tmp_path, number):
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a background run ignores it
    program = subprocess.Popen([sys.executable, "-c", OWN], cwd=host.PACK, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, preexec_fn=listen)
    assert program.stdout.readline() == "ready\n"
    time.sleep(1)
    family = descendants(program.pid)
    assert len(family) >= 2  # the child and its ComfyUI
    program.send_signal(number)
    program.communicate(timeout=150)
    deadline = time.monotonic() + 100
    while any(map(alive, family)):
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.1)


def descendants(pid):
    found = []
    for child in open(f"/proc/{pid}/task/{pid}/children").read().split():
        found += [child, *descendants(child)]
    return found


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_examples_of_the_page_run(server, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    for name in ("cat.png", "dog.png"):
        (tmp_path / name).write_bytes(EXAMPLE.read_bytes())
    (tmp_path / "stillmotion").symlink_to(host.PACK)  # beside the scripts, as if installed
    for number, block in enumerate(blocks):
        for real, small in (('"512_512", device="cuda:0"', f'"demo", server="{server.url}"'),
                            ("num_inference_steps=50", "num_inference_steps=2"),
                            ("http://gpu1:8188", server.url), (', "http://gpu2:8188"', ""), ("512_512", "demo")):
            block = block.replace(real, small)
        script = tmp_path / f"example{number}.py"
        script.write_text(block)
        done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    assert len(frames_of(tmp_path / "cat.mp4")) == 16
