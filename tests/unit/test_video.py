"""Save Video: what is in the files, and that nothing half-written stays."""
import errno
import io
import json
from fractions import Fraction
from pathlib import Path

import av
import folder_paths
import numpy as np
import pytest
import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, Types
from PIL import Image
from core_calls import with_hidden
from stillmotion.nodes.common import video as files
from stillmotion.nodes.common.nodes import SaveVideo

PROMPT = {"1": {"class_type": "Stillmotion_SaveVideo", "inputs": {"text": 'a "red" circle, \u00e9\u4e2d'}}}
WORKFLOW = {"nodes": [], "version": 0.4}


def clip(frames=6, height=48, width=64):
    """A bright square on a two-coloured ground, two pixels further right in every frame: [N,H,W,3] in 0..1."""
    images = torch.zeros(frames, height, width, 3)
    images[..., 2], images[:, : height // 2, :, 1] = 0.4, 0.5
    for i in range(frames):
        images[i, 10:26, 4 + 2 * i:20 + 2 * i] = torch.tensor([0.9, 0.7, 0.1])
    return images


def decode(data):
    """(frames [N,H,W,3] uint8, video stream's rate, tags) of MP4 bytes."""
    with av.open(io.BytesIO(data)) as container:
        rate, tags = container.streams.video[0].average_rate, dict(container.metadata)
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]), rate, tags


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Runs the node into tmp_path as ComfyUI does; returns (paths of the files shown, NodeOutput)."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))

    def run(format="mp4", fps=8.0, crf=8, filename_prefix="clips/test", **sources):
        node = with_hidden(SaveVideo, PROMPT, {"workflow": WORKFLOW})
        out = node.execute(filename_prefix=filename_prefix, fps=fps, format=format, crf=crf, **sources)
        return [tmp_path / i["subfolder"] / i["filename"] for i in out.ui["images"]], out

    return run


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize("fps, rate", [(8.0, Fraction(8)), (23.976, Fraction(23976, 1000)), (0.5, Fraction(1, 2))])
def test_mp4_holds_the_frames_at_their_rate(fps, rate):
    frames, got, _ = decode(files.encode_mp4(files.frames_uint8(clip()), fps, crf=4))
    assert frames.shape == (6, 48, 64, 3)
    assert float(got) == pytest.approx(float(rate), rel=1e-4)
    assert np.abs(frames / 255 - clip().numpy()).mean() < 0.01


@pytest.mark.parametrize("height, width", [(47, 63), (48, 33), (1, 1), (17, 64)])
def test_mp4_of_an_odd_size_repeats_the_last_row_and_column(height, width):
    images = torch.rand(2, 1, 1, 3, generator=torch.manual_seed(3)).expand(2, height, width, 3)
    frames, _, _ = decode(files.encode_mp4(files.frames_uint8(images), 8, crf=1))
    assert frames.shape == (2, height + height % 2, width + width % 2, 3)
    assert np.abs(frames / 255 - images[:, :1, :1].numpy()).max() < 0.03


def test_mp4_says_which_colour_matrix_it_uses():
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.6, 0.3]])
    images = colours.repeat_interleave(16, 0)[None, None].expand(3, 32, 64, 3)
    data = files.encode_mp4(files.frames_uint8(images), 8, crf=1)
    with av.open(io.BytesIO(data)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.colorspace) == ("h264", "yuv420p", 1)  # 1: BT.709
    assert np.abs(decode(data)[0][:, 16, 8::16] / 255 - colours.numpy()).max() < 0.02


def test_mp4_and_png_carry_prompt_and_workflow_as_two_tags(save):
    (mp4,), _ = save(images=clip())
    tags = decode(mp4.read_bytes())[2]
    assert json.loads(tags["prompt"]) == PROMPT and json.loads(tags["workflow"]) == WORKFLOW
    pngs, _ = save("png frames", images=clip())
    for png in pngs:
        text = Image.open(png).text
        assert json.loads(text["prompt"]) == PROMPT and json.loads(text["workflow"]) == WORKFLOW


def test_no_tags_where_the_host_says_so(save, monkeypatch):
    monkeypatch.setattr(args, "disable_metadata", True)
    (mp4,), _ = save(images=clip())
    assert not {"prompt", "workflow"} & set(decode(mp4.read_bytes())[2])
    assert Image.open(save("png frames", images=clip())[0][0]).text == {}


def test_png_frames_are_exact_and_numbered(save):
    paths, out = save("png frames", images=clip())
    assert [p.name for p in paths] == [f"frame_{i:04}.png" for i in range(1, 7)]
    assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in paths]),
                          (clip() * 255).round().byte().numpy())
    assert out.ui["animated"] == (False,)


@pytest.mark.parametrize("fps", [8, 12.5, 30, 50])
def test_gif_loops_with_all_frames_colours_and_the_right_length(fps):
    gif = Image.open(io.BytesIO(files.encode_gif(files.frames_uint8(clip(24)), fps)))
    assert gif.n_frames == 24 and gif.info["loop"] == 0
    length, worst = 0, 0
    for i, frame in enumerate(clip(24).numpy()):
        gif.seek(i)
        length += gif.info["duration"]
        worst = max(worst, np.abs(np.asarray(gif.convert("RGB")) / 255 - frame).max())
    assert abs(length - 24000 / fps) <= 10
    assert worst < 0.02


def test_files_are_numbered_on_and_never_overwritten(save):
    first, _ = save(images=clip())
    before = first[0].read_bytes()
    names = [save(form, images=clip())[0][0].relative_to(first[0].parent).parts[0]
             for form in ("gif", "png frames", "mp4")]
    assert names == ["test_00002_.gif", "test_00003_", "test_00004_.mp4"]
    assert first[0].name == "test_00001_.mp4" and first[0].read_bytes() == before


def test_a_video_keeps_its_rate_and_sound_and_goes_on(save):
    wave = torch.sin(torch.arange(44100) * 2 * torch.pi * 440 / 44100).expand(1, 2, -1)
    parts = Types.VideoComponents(images=clip(8), frame_rate=Fraction(16), audio={"waveform": wave,
                                                                                "sample_rate": 44100})
    given = InputImpl.VideoFromComponents(parts)
    (path,), out = save(video=given, fps=3.0)
    assert out.args == (given,)
    back = InputImpl.VideoFromFile(str(path)).get_components()
    assert back.frame_rate == 16 and len(back.images) == 8
    seconds = back.audio["waveform"].shape[-1] / back.audio["sample_rate"]
    assert seconds == pytest.approx(0.5, abs=0.06)
    assert back.audio["waveform"][..., 4000:18000].pow(2).mean() == pytest.approx(0.5, rel=0.2)  # AAC takes a little


def test_images_come_out_as_video(save):
    _, out = save("gif", images=clip(), fps=12.5)
    parts = out.args[0].get_components()
    assert torch.equal(parts.images, clip()) and parts.frame_rate == Fraction(25, 2)


@pytest.mark.parametrize("sources, words", [({}, "neither"), ({"images": clip(1), "video": "a video"}, "both")])
def test_exactly_one_source(save, sources, words):
    with pytest.raises(ValueError, match=words):
        save(**sources)


@pytest.mark.parametrize("format", files.FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_pixels_are_refused_and_named(save, tmp_path, format, value):
    images = clip()
    images[3, 5, 5, 0] = value
    with pytest.raises(ValueError, match=r"1 of 6 frames \(first: 3\)"):
        save(format, images=images)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("change, words", [
    ({"format": "avi"}, "avi.*mp4, gif, png frames"), ({"fps": 0.0}, "fps = 0"), ({"fps": 1000.0}, "at most 240"),
    ({"fps": 60.0, "format": "gif"}, "at most 50"), ({"crf": 0}, "crf = 0"), ({"crf": 52}, "crf = 52"),
    ({"images": clip(1)[0]}, "shape"), ({"images": clip()[:0]}, "empty"), ({"images": clip()[..., :1]}, "channels")])
def test_bad_settings_are_refused(save, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        save(**{"images": clip()} | change)
    assert leftovers(tmp_path) == []


def test_size_and_date_are_filled_into_the_name(save):
    (path,), _ = save(images=clip(), filename_prefix="%year%/%width%x%height%")
    assert path.name == "64x48_00001_.mp4" and path.parent.name.isdigit()


def test_a_prefix_outside_the_output_folder_is_refused(save):
    with pytest.raises(Exception, match="outside the output folder"):
        save(images=clip(), filename_prefix="../../escape/x")


@pytest.mark.parametrize("format", files.FORMATS)
def test_a_folder_that_cannot_be_used_is_named(save, tmp_path, format):
    (tmp_path / "clips").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="could not save .*clips/test.*Nothing was written.*choose another"):
        save(format, images=clip())


@pytest.mark.parametrize("format", files.FORMATS)
def test_a_full_disk_leaves_nothing(save, tmp_path, monkeypatch, format):
    written = []

    def fill_up(path, data):
        with open(path, "wb") as half:
            half.write(data[: len(data) // 2])
        written.append(path)
        if len(written) == (3 if format == "png frames" else 1):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OSError, match="could not save .*No space left on device.*Free space") as caught:
        save(format, images=clip())
    assert caught.value.errno == errno.ENOSPC
    assert written and list((tmp_path / "clips").iterdir()) == []


def test_rgba_and_out_of_range_values_are_clamped():
    images = torch.cat([clip() * 3 - 1, torch.full((6, 48, 64, 1), 0.5)], -1)
    frames = list(files.frames_uint8(images))
    assert np.array_equal(np.stack(frames), ((clip() * 3 - 1).clamp(0, 1) * 255).round().byte().numpy())
