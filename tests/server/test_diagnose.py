"""workflows/diagnose.py and workflows/generate.py on a server, run as a user would."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import host
import pytest
from PIL import Image

EARLY = host.PACK / "nodes" / "demo" / "video_unet_early.safetensors"


def call(script, *arguments, cwd, given=""):
    done = subprocess.run([sys.executable, str(host.WORKFLOWS / script), *map(str, arguments)], cwd=cwd, text=True,
                          input=given, capture_output=True, timeout=300, env=dict(os.environ, PYTHONUNBUFFERED="1"))
    return done.stdout, done.stderr, done.returncode


def test_the_demo_is_found_good(server, tmp_path):
    out, err, code = call("diagnose.py", "--server", server.url, cwd=tmp_path)
    assert code == 0 and out.startswith("good: all 9 checks are good\n"), out + err
    saved = Image.open(tmp_path / "results" / "diagnosis.png")
    assert saved.width == 800 and saved.height > 900


def test_a_quick_diagnosis_as_json(server, tmp_path):
    out, err, code = call("diagnose.py", "--server", server.url, "--quick", "--steps", "3", "--json", cwd=tmp_path)
    found = json.loads(out)
    assert code == 0 and len(found["steps"]) == 3 and found["values"] == 9216
    assert [f["topic"] for f in found["findings"]] == ["latent", "positive text", "start image", "negative text",
                                                       "sampling", "decoded frames"]
    assert not (tmp_path / "results").exists()


def test_clipping_saves_a_model_early_in_its_training(server, tmp_path):
    """Measured figures of the shipped file: PSNR against the true clip, and values clipped at each step."""
    out, err, code = call("diagnose.py", "--server", server.url, "--clipping", cwd=tmp_path)
    without, with_clip = map(float, re.search(r"PSNR ([\d.]+) dB without, ([\d.]+) dB with clipping", out).groups())
    assert code == 0 and with_clip - without >= 3, out + err
    counts = [int(n) for n in re.search(r"clipped at each step: ([\d, ]+)\.", out)[1].split(", ")]
    assert len(counts) == 20 and counts[0] > 3000 > counts[-1]


@pytest.mark.parametrize("arguments, words", [
    (["--checkpoint", "missing.ckpt"], "not in the server's models/checkpoints"),
    (["--video", "clip.mp4"], "there is no file clip.mp4"),
])
def test_bad_options_of_diagnose(server, tmp_path, arguments, words):
    out, err, code = call("diagnose.py", "--server", server.url, *arguments, cwd=tmp_path)
    assert code and words in err and "Traceback" not in err


@pytest.fixture
def early(server):
    """The name of the shipped early checkpoint in the server's list."""
    folder = Path(server.base) / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(EARLY, folder / EARLY.name)
    return EARLY.name


def test_a_video_unet_is_told_by_its_header(server, early, tmp_path):
    out, err, code = call("diagnose.py", "--server", server.url, "--checkpoint", early, "--steps", "4", cwd=tmp_path)
    assert code == 0 and "PSNR" in out and "without" not in out, out + err
    assert f"EMA: {early} holds only one set of weights" in out


def test_generate_saves_what_was_asked_for(server, early, tmp_path):
    out, err, code = call("generate.py", "--server", server.url, "--checkpoint", early, "--steps", "2", "--prompts",
                          "a red circle moves left", "blue square moving up", "--save_gif", "--save_frames",
                          "--visualize", "--output", tmp_path / "made", cwd=tmp_path)
    assert code == 0, out + err
    names = ["01_a_red_circle_moves_left", "02_blue_square_moving_up"]
    expected = {"preview.png", *names, *(f"{n}.mp4" for n in names), *(f"{n}.gif" for n in names)}
    assert {path.name for path in (tmp_path / "made").iterdir()} == expected
    assert all(len(list((tmp_path / "made" / name).glob("*.png"))) == 16 for name in names)
    with av.open(str(tmp_path / "made" / f"{names[0]}.mp4")) as container:
        assert container.streams.video[0].average_rate == 8
        assert len(list(container.decode(video=0))) == 16
    again = ["generate.py", "--server", server.url, "--checkpoint", early, "--steps", "1", "--prompts",
             "a red circle moves left", "--save_frames", "--output", tmp_path / "made"]
    call(*again, cwd=tmp_path)  # another seed, another video: old files are kept, and the new ones share one name
    assert {path.name for path in (tmp_path / "made").iterdir()} == expected | {f"{names[0]}-2", f"{names[0]}-2.mp4"}
    call(*again, "--overwrite", cwd=tmp_path)
    assert len(list((tmp_path / "made").iterdir())) == len(expected) + 2


def test_generate_asks_for_prompts_where_none_is_given(server, early, tmp_path):
    out, err, code = call("generate.py", "--server", server.url, "--checkpoint", early, "--steps", "1", cwd=tmp_path,
                          given="a red circle moves left\n\nnever read\n")
    assert code == 0, out + err
    path, = (tmp_path / "results" / "generate").iterdir()
    assert path.name == "01_a_red_circle_moves_left.mp4"


def test_generate_goes_on_after_a_prompt_that_fails(server, early, tmp_path):
    out, err, code = call("generate.py", "--server", server.url, "--checkpoint", early, "--steps", "1", "--width", "60",
                          "--prompts", "one", "two", cwd=tmp_path)
    assert code == 1 and err.count("multiple of 8") == 2 and "2 videos failed" in err and "Traceback" not in err
    shutil.copy(host.PACK / "nodes" / "demo" / "dynamicrafter_demo.safetensors",
                Path(server.base) / "models" / "checkpoints" / "other.safetensors")
    out, err, code = call("generate.py", "--server", server.url, "--checkpoint", "other.safetensors", "--prompts",
                          "one", cwd=tmp_path)
    assert code == 1 and "other.safetensors is no video U-Net" in err
