"""Inputs and outputs of Video Folder, Moving Shapes, Latent Shards, Clip of a Data Set and Evaluate Video."""
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import pytest
import torch
from stillmotion.nodes.evaluation.nodes import EvaluateVideo
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.data.folders import write_shapes
from stillmotion.nodes.training.data.nodes import DataSetClip, LatentShardsNode, MovingShapesNode, VideoFolderNode
from stillmotion.nodes.training.data.shards import pack

FOLDER = {"frames": 4, "width": 64, "height": 48, "stride": 0, "problems": "skip", "sizes": "any", "mirror": False,
          "max_samples": 0, "seed": 0}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    return tmp_path


def test_a_folder_by_whole_path_or_inside_the_input_folder(inputs):
    write_shapes(MovingShapes(2, frames=4), inputs / "shapes")
    (inputs / "shapes" / "captions" / "shape_00000.txt").unlink()
    for name in ("shapes", str(inputs / "shapes")):
        clips, summary, preview = VideoFolderNode.execute(name, **FOLDER)
        assert len(clips) == 1 and clips[0]["video"].shape == (3, 4, 48, 64)
        assert "1 skipped:\n- shape_00000.mp4" in summary
        assert preview.ndim == 4 and len(preview) == 1 and 0 <= preview.min() < 0.5 < preview.max() <= 1
    with pytest.raises(ValueError, match="there is no folder"):
        VideoFolderNode.execute("nowhere", **FOLDER)


def test_other_folders_are_refused_alike_unless_the_owner_lists_them(inputs, monkeypatch):
    listed, other = inputs.parent / f"{inputs.name}_listed", inputs.parent / f"{inputs.name}_other"
    for folder in (listed / "shapes", other):
        write_shapes(MovingShapes(1, frames=4), folder)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "stillmotion_data_sets", ([str(listed)], set()))
    assert len(VideoFolderNode.execute(str(listed / "shapes"), **FOLDER).args[0]) == 1
    for name in (str(other), f"../{other.name}", str(inputs.parent / "nowhere"), "/", "~", "~nobody", "", "a\0b",
                 "shapes/../../x"):
        with pytest.raises(ValueError, match="inside a folder that the owner of this ComfyUI lists"):
            VideoFolderNode.execute(name, **FOLDER)
        assert VideoFolderNode.fingerprint_inputs(name)
    with pytest.raises(ValueError, match="there is no folder"):
        VideoFolderNode.execute("x" * 5000, **FOLDER)


def test_a_cancelled_scan_stops_at_the_next_clip(inputs, monkeypatch):
    write_shapes(MovingShapes(3, frames=4), inputs / "shapes")
    calls = []

    def stop():
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(KeyboardInterrupt):
        VideoFolderNode.execute("shapes", **FOLDER)


def test_a_folder_is_read_again_when_its_files_change(inputs):
    before = VideoFolderNode.fingerprint_inputs("shapes", frames=4)
    write_shapes(MovingShapes(1, frames=4), inputs / "shapes")
    written = VideoFolderNode.fingerprint_inputs("shapes", frames=4)
    (inputs / "shapes" / "captions" / "shape_00000.txt").write_text("another caption")
    assert len({before, written, VideoFolderNode.fingerprint_inputs("shapes", frames=4)}) == 3


def test_clips_of_drawn_shapes():
    clips, summary, preview = MovingShapesNode.execute(3, 4, 32, True, 7)
    assert "3 clips of moving shapes, kept from training, 4 frames of 32x32, seed 7" in summary
    frames, caption, name = DataSetClip.execute(clips, 2)
    assert frames.shape == (4, 32, 32, 3) and torch.equal(frames, (clips[2]["video"].movedim(0, -1) / 2 + 0.5))
    assert (caption, name) == (clips[2]["caption"], "shape_00002")
    own = MovingShapesNode.execute(1, 2, 0, True, 7, SimpleNamespace(trained_size=(48, 32))).args[0]
    assert own[0]["video"].shape == (3, 2, 32, 48)
    with pytest.raises(ValueError, match="connect the VAE that came with the model"):
        MovingShapesNode.execute(1, 2, 0, True, 7)
    with pytest.raises(ValueError, match="clips 0 to 2"):
        DataSetClip.execute(clips, 3)


def test_packed_clips_have_no_frames_to_show(inputs):
    pytest.importorskip("lmdb")
    pack(MovingShapes(2, frames=2), inputs / "packed", lambda video: video, "pixels")
    shards, summary, preview = LatentShardsNode.execute("packed", 0)
    assert len(shards) == 2 and "by pixels" in summary and preview.shape[-1] == 3
    with pytest.raises(ValueError, match="packed latents without frames"):
        DataSetClip.execute(shards, 0)


def test_evaluation_gives_table_plot_and_means():
    pytest.importorskip("skimage")
    frames = MovingShapes(1, frames=2)[0]["video"].movedim(0, -1) / 2 + 0.5
    table, plot, psnr, ssim, motion = EvaluateVideo.execute(frames, frames, 0)
    assert table.splitlines()[1].split() == ["mean", "100.00", "1.0000", "0.000"] and plot.shape[-1] == 3
    assert (psnr, motion) == (100, 0) and ssim == pytest.approx(1)
    assert EvaluateVideo.execute(frames, 1 - frames, 1)[4] == 0
