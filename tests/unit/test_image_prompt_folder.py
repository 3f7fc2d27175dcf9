"""Image-Prompt Folder: which pictures a run takes, in which order, and from which folders."""
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from stillmotion.nodes.common.nodes_folder import ImagePromptFolder


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in (10, 2, 1):
        Image.new("RGB", (16, 8 + number), (number, 0, 255)).save(folder / f"cat{number}.png")
    (folder / "prompts.txt").write_text("one\ntwo\nten\n")
    return folder


def run(folder="pictures", index=0, limit=1, filter=""):
    return ImagePromptFolder.execute(folder, index, limit, filter).args


def test_one_a_run_in_natural_order(pictures):
    found = [run(index=index) for index in range(3)]
    assert [(prompts, names, count) for _, prompts, names, count, _ in found] == [
        (["one"], ["cat1"], 3), (["two"], ["cat2"], 3), (["ten"], ["cat10"], 3)]
    (image,), *_ = found[2]
    assert image.shape == (1, 18, 16, 3) and image.dtype == torch.float32
    assert torch.equal(image[0, 0, 0], torch.tensor([10 / 255, 0, 1]))
    with pytest.raises(ValueError, match="index = 3 was given; the folder has the pictures 0 to 2. The queue"):
        run(index=3)


def test_lists_of_all_or_some(pictures):
    images, prompts, names, count, summary = run(limit=0, index=1)
    assert [image.shape[1] for image in images] == [10, 18] and prompts == ["two", "ten"] and names == ["cat2", "cat10"]
    assert (count, summary) == (3, "3 pictures")
    assert run(limit=2)[2] == ["cat1", "cat2"]
    assert run(limit=0, filter=" *1*")[2:4] == (["cat1", "cat10"], 2)


def test_what_cannot_be_used_is_named(pictures):
    (pictures / "notes.pdf").touch()
    assert "1 left out:\n- notes.pdf" in run()[4]
    with pytest.raises(ValueError, match="no picture with a prompt that fits filter = 'dog'"):
        run(filter="dog")
    (pictures / "cat1.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cat1.png is no picture"):
        run()
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(pictures / "cat1.png")
    with pytest.raises(ValueError, match="cat1.png is grey with 16 bits"):
        run()


def test_folders_elsewhere_are_refused_and_changes_are_seen(pictures, tmp_path):
    for folder in ("/", "..", "~", "", "a\0b"):
        with pytest.raises(ValueError, match="inside a folder that the owner of this ComfyUI lists"):
            run(folder)
    before = ImagePromptFolder.fingerprint_inputs("pictures", index=0)
    assert before == ImagePromptFolder.fingerprint_inputs("pictures", index=0)
    (pictures / "prompts.txt").write_text("another")
    assert before != ImagePromptFolder.fingerprint_inputs("pictures", index=0)
