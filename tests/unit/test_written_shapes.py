"""Moving Shapes written to a folder of clips."""
import pytest
from stillmotion.nodes.training.data import folders
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.data.folders import VideoFolder, write_shapes


def test_shapes_on_disk_are_the_drawn_ones(tmp_path):
    shapes = MovingShapes(3, frames=6)
    write_shapes(shapes, tmp_path / "shapes")
    for drawn, read in zip(shapes, VideoFolder(tmp_path / "shapes", frames=6)):
        assert read["caption"] == drawn["caption"] and (read["video"] - drawn["video"]).abs().mean() < 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    with pytest.raises(ValueError, match="there already"):
        write_shapes(shapes, tmp_path / "shapes")


def test_shapes_that_could_not_all_be_written_leave_nothing(tmp_path, monkeypatch):
    shapes = MovingShapes(3, frames=6)
    films = iter([b"film"])
    monkeypatch.setattr(folders, "encode_mp4", lambda *settings, **more: next(films))
    with pytest.raises(StopIteration):
        write_shapes(shapes, tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []
