"""nodes/common/pictures.py: reads folders, prompts and start pictures."""
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image
from stillmotion.nodes.common import pictures


def save(path, mode="RGB", size=(16, 12), colour=None, **options):
    Image.new(mode, size, colour or 0).save(path, **options)
    return path


def test_all_kinds_of_pictures_meet_their_prompts(tmp_path):
    names = ["a.png", "b.webp", "c.jfif", "d.avif", "e.tif", "f.PNG", "g.JPG"]
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / name[0]).with_suffix(".TXT" if name[0] == "f" else ".txt").write_text(f"prompt {name[0]}\n")
    found, left_out = pictures.picture_prompts(tmp_path)
    assert [(path.name, prompt) for path, prompt in found] == [(name, f"prompt {name[0]}") for name in names]
    assert left_out == [] and pictures.summary(left_out) == ""


def test_what_is_left_out_is_counted_and_named(tmp_path):
    for name in ("alone.png", "._cat.png", "._cat.txt", ".DS_Store", "Thumbs.db", "cat.png", "notes.pdf", "bad.png"):
        (tmp_path / name).touch()
    (tmp_path / "cat.txt").write_text("a cat")
    (tmp_path / "dog.txt").write_text("a dog")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    found, left_out = pictures.picture_prompts(tmp_path)
    assert [(path.name, prompt) for path, prompt in found] == [("cat.png", "a cat")]
    reasons = dict(left_out)
    assert reasons.pop("notes.pdf").startswith("no picture (.png") and "bad.txt is not UTF-8" in reasons.pop("bad.png")
    assert reasons == {"folder.png": "a folder", "gone.png": "a link to nothing", "pipe.png": "no file, no folder",
                       "alone.png": "there is no alone.txt beside it",
                       "dog.txt": "there is no picture of this name"}
    assert pictures.summary(left_out).splitlines()[0] == "7 left out:"
    assert "- gone.png: a link to nothing" in pictures.summary(left_out)
    assert pictures.summary([pictures.LeftOut(str(i), "x") for i in range(25)]).endswith("- and 5 more")


def test_one_file_of_prompts_in_natural_order_and_a_filter(tmp_path):
    for name in ("Cat10.PNG", "cat2.jpg", "cat1.png", "dog.png"):
        (tmp_path / name).touch()
    (tmp_path / "test_prompts.txt").write_text("one\n\nten\ndog\n")
    (tmp_path / "cat2.txt").write_text("its own")
    found, left_out = pictures.picture_prompts(tmp_path)
    assert [(path.name, prompt) for path, prompt in found] == [
        ("cat1.png", "one"), ("cat2.jpg", "its own"), ("Cat10.PNG", "ten"), ("dog.png", "dog")] and left_out == []
    for fits, names in (("cat*", ["cat1.png", "cat2.jpg", "Cat10.PNG"]), ("dog", ["dog.png"]), ("do", []),
                        ("*.png", ["cat1.png", "Cat10.PNG", "dog.png"])):
        assert [path.name for path, _ in pictures.picture_prompts(tmp_path, fits)[0]] == names
    (tmp_path / "test_prompts.txt").write_text("the same for all")
    assert {prompt for _, prompt in pictures.picture_prompts(tmp_path)[0]} == {"the same for all", "its own"}


def test_the_prompt_of_a_picture_named_prompts_is_its_own(tmp_path):
    for name in ("prompts.png", "other.png"):
        (tmp_path / name).touch()
    (tmp_path / "prompts.txt").write_text("a list\non paper\nand more")
    found, left_out = pictures.picture_prompts(tmp_path)
    assert [path.name for path, _ in found] == ["prompts.png"] and [name for name, _ in left_out] == ["other.png"]


def test_accents_of_macos_and_of_others_are_one_name(tmp_path):
    (tmp_path / unicodedata.normalize("NFD", "caf\u00e9.png")).touch()
    (tmp_path / unicodedata.normalize("NFC", "caf\u00e9.txt")).write_text("coffee")
    found, left_out = pictures.picture_prompts(tmp_path)
    assert [prompt for _, prompt in found] == ["coffee"] and left_out == []


@pytest.mark.parametrize("data", [
    b"a cat", b"\xef\xbb\xbfa cat\r\n", "\ufeffa cat".encode("utf-16-le"), "\ufeffa cat".encode("utf-16-be"),
    b" a\0 cat\n"])
def test_prompts_as_editors_save_them(tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    assert pictures.read_prompt(tmp_path / "p.txt") == "a cat"


def test_prompts_that_are_none(tmp_path):
    (tmp_path / "long.txt").write_bytes(b"x" * 100_001)
    with pytest.raises(ValueError, match="long.txt has more than 100000 bytes"):
        pictures.read_prompt(tmp_path / "long.txt")
    with pytest.raises(ValueError, match="gone.txt cannot be read"):
        pictures.read_prompt(tmp_path / "gone.txt")


@pytest.mark.parametrize("mode, colour, name", [
    ("L", 200, "a.png"), ("P", 7, "a.gif"), ("CMYK", (0, 55, 255, 0), "a.jpg"), ("RGBA", (9, 8, 7, 0), "a.png"),
    ("1", 1, "a.tif"), ("LA", (200, 9), "a.webp")])
def test_modes_become_rgb(tmp_path, mode, colour, name):
    path = save(tmp_path / name, mode, colour=colour)
    picture = pictures.open_picture(path)
    assert picture.mode == "RGB" and picture.size == (16, 12)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bits_of_grey_keep_their_levels(tmp_path, name):
    ramp = np.tile(np.arange(0, 65536, 257, dtype=np.uint16), (8, 1))
    Image.fromarray(ramp).save(tmp_path / name)
    assert np.array_equal(np.asarray(pictures.open_picture(tmp_path / name))[0, :, 1], np.arange(256))
    assert not pictures.is_plain(tmp_path / name)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_the_first_picture_of_an_animation(tmp_path, name):
    reds = [Image.new("RGB", (32, 32), (i * 60, 0, 0)) for i in range(1, 4)]
    reds[0].save(tmp_path / name, save_all=True, append_images=reds[1:])
    assert abs(np.asarray(pictures.open_picture(tmp_path / name))[..., 0].astype(int) - 60).max() < 3
    assert not pictures.is_plain(tmp_path / name)


def test_turned_photos_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: the top is at the right
    save(tmp_path / "a.jpg", size=(40, 20), exif=exif)
    assert pictures.open_picture(tmp_path / "a.jpg").size == (20, 40) and pictures.is_plain(tmp_path / "a.jpg")


@pytest.mark.parametrize("write, words", [
    (lambda path: save(path, size=(1, 64)), "a.png is 1x64 pixels; each side needs 8 or more"),
    (lambda path: path.write_bytes(b"<html>"), "a.png is no picture that can be read"),
    (lambda path: path.write_bytes(save(path, size=(300, 300), colour=(9, 9, 9)).read_bytes()[:200]), "damaged"),
    (lambda path: Image.fromarray(np.ones((9, 9), np.float32)).save(path, "TIFF"), "pixels of the kind F"),
    (lambda path: Image.fromarray(np.full((9, 9), 1 << 20, np.int32)).save(path, "TIFF"), "pixels of the kind I"),
    (lambda path: path.mkdir(), "damaged or cannot be read"),
])
def test_pictures_that_are_refused_in_words(tmp_path, write, words):
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match=words):
        pictures.open_picture(tmp_path / "a.png")
