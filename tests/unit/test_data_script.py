"""workflows/data.py: what it writes, prints and returns."""
import os

import data as script
import pytest
import torch
from stillmotion.nodes.training.data.folders import VideoFolder
from stillmotion.nodes.training.data.shards import LatentShards


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script in this process, where the pack is already loaded; (exit code or message, printed text)."""
    monkeypatch.setattr(script.host, "reexec", lambda comfyui: os.environ["STILLMOTION_COMFYUI"])
    monkeypatch.setattr(script.inprocess, "import_pack", lambda comfyui: None)

    def call(*arguments):
        monkeypatch.setattr(script.sys, "argv", ["data.py", *map(str, arguments)])
        try:
            code = script.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return call


def test_shapes_are_written_and_found_whole(run, tmp_path):
    code, text = run("shapes", tmp_path / "shapes", "--count", 3, "--num_frames", 4, "--frame_size", 32)
    assert not code and "3 clips of moving shapes" in text
    assert len(VideoFolder(tmp_path / "shapes", frames=4, size=(32, 32))) == 3
    code, text = run("check", tmp_path / "shapes", "--num_frames", 4)
    assert code == 0 and "3 clips" in text and "skipped" not in text
    code, _ = run("shapes", tmp_path / "shapes")
    assert code.startswith("error: ") and "there already" in code


def test_check_names_what_is_wrong(run, tmp_path):
    run("shapes", tmp_path / "shapes", "--count", 2, "--num_frames", 4)
    (tmp_path / "shapes" / "captions" / "shape_00001.txt").unlink()
    code, text = run("check", tmp_path / "shapes", "--num_frames", 4)
    assert code == 1 and "1 skipped:\n- shape_00001.mp4: no caption" in text
    code, _ = run("check", tmp_path / "shapes")
    assert "too short, it has 4 of the 16 frames" in code


def test_clips_are_packed_with_the_vae_of_the_demo(run, tmp_path):
    pytest.importorskip("lmdb")
    run("shapes", tmp_path / "shapes", "--count", 2, "--num_frames", 2)
    code, text = run("pack", tmp_path / "shapes", tmp_path / "packed", "--num_frames", 2)
    assert not code and "2 packed clips from packed, latents [4, 2, 8, 8] by demo" in text
    clip, item = VideoFolder(tmp_path / "shapes", frames=2)[1], LatentShards(tmp_path / "packed")[1]
    decoded = script.load_vae("demo").decode(item["latent"][None])[0]
    assert (decoded.movedim(-1, 0) * 2 - 1 - clip["video"]).abs().mean() < 0.1
    assert item["caption"] == clip["caption"] and torch.allclose(item["reference"], clip["video"][:, 0], atol=0.01)
    code, _ = run("pack", tmp_path / "shapes", tmp_path / "packed", "--num_frames", 2, "--max_samples", 1)
    assert code.startswith("error: ") and "was begun with" in code


def test_sizes_are_written_as_users_write_them(run, tmp_path):
    run("shapes", tmp_path / "shapes", "--count", 1, "--num_frames", 2)
    code, text = run("check", tmp_path / "shapes", "--num_frames", 2, "--frame_size", "512x320")
    assert code == 0 and "of 512x320" in text
    code, _ = run("check", tmp_path / "shapes", "--frame_size", "big")
    assert "frame_size is 'big'" in code and "WIDTHxHEIGHT" in code
