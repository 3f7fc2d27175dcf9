"""Save Video: the contents of the files, and no partial files left behind."""
import errno
import io
import json
from fractions import Fraction
from pathlib import Path

import av
import comfy.model_management
import folder_paths
import numpy as np
import pytest
import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, Types
from core_calls import with_hidden
from PIL import Image
from stillmotion.nodes.common import video as files
from stillmotion.nodes.common.nodes import SaveVideo

PROMPT = {"1": {"class_type": "Stillmotion_SaveVideo", "inputs": {"text": 'a "red" circle, \u00e9\u4e2d'}}}
WORKFLOW = {"nodes": [], "version": 0.4}


def clip(frames=6, height=48, width=64):
    """A bright square on a two-coloured background, moving two pixels right per frame: [N,H,W,3] in 0..1."""
    images = torch.zeros(frames, height, width, 3)
    images[..., 2], images[:, : height // 2, :, 1] = 0.4, 0.5
    for i in range(frames):
        images[i, 10:26, 4 + 2 * i:20 + 2 * i] = torch.tensor([0.9, 0.7, 0.1])
    return images


def decode(data):
    """(frames [N,H,W,3] uint8, frame rate of the video stream, tags) of MP4 bytes."""
    with av.open(io.BytesIO(data)) as container:
        rate, tags = container.streams.video[0].average_rate, dict(container.metadata)
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]), rate, tags


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Run the node with output to tmp_path as ComfyUI does; returns (paths of the files shown, NodeOutput)."""
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
    assert back.audio["waveform"][..., 4000:18000].pow(2).mean() == pytest.approx(0.5, rel=0.2)  # AAC loses a little


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
    ({"format": "avi"}, "avi.*mp4, gif, png frames"), ({"fps": 0.0}, "fps = 0"),
    ({"fps": float("nan")}, "fps = nan"), ({"fps": 1e-5}, "fps = 1e-05"), ({"fps": 1000.0}, "at most 240"),
    ({"fps": 60.0, "format": "gif"}, "at most 50"), ({"crf": 0}, "crf = 0"), ({"crf": 52}, "crf = 52"),
    ({"images": clip(1)[0]}, "shape"), ({"images": clip()[:0]}, "empty"), ({"images": clip()[..., :1]}, "channels")])
def test_bad_settings_are_refused(save, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        save(**{"images": clip()} | change)
    assert leftovers(tmp_path) == []


def test_size_and_date_are_filled_into_the_name(save):
    (path,), _ = save(images=clip(), filename_prefix="%year%/%width%x%height%")
    assert path.name == "64x48_00001_.mp4" and path.parent.name.isdigit()


@pytest.mark.parametrize("prefix", ["clips/", "a/b/", "", "a/.", ".", "a/..", "clips/\u4e2d\u3000", "n" * 240])
def test_every_prefix_numbers_on(save, tmp_path, prefix):
    contents = []
    for count in (2, 3):
        (path,), _ = save(images=clip(count), filename_prefix=prefix)
        contents.append((path, path.read_bytes()))
    assert contents[0][0].name.endswith("_00001_.mp4") and contents[1][0].name.endswith("_00002_.mp4")
    assert all(path.read_bytes() == data for path, data in contents)
    assert sorted(leftovers(tmp_path)) == sorted(path for path, _ in contents)


@pytest.mark.parametrize("prefix", ["../x", "../../escape/x", "/tmp/x", "a/../../x", ".."])
def test_a_prefix_outside_the_output_folder_is_refused(save, prefix):
    with pytest.raises(ValueError, match="outside the output folder"):
        save(images=clip(), filename_prefix=prefix)


@pytest.mark.parametrize("prefix, words", [
    ("a\0b", "NUL or half"), ("a\nb", "line ends"), ("\ud800", "NUL or half"), ("n" * 300, "at most 240"),
    ("d" * 300 + "/x", "at most 240"), ("\u4e2d" * 100, "at most 240"), ("d/" * 600, "1000 in all")])
def test_prefixes_that_name_no_file_are_refused(save, tmp_path, prefix, words):
    with pytest.raises(ValueError, match=words):
        save(images=clip(), filename_prefix=prefix)
    assert list(tmp_path.iterdir()) == []


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

    def full(frame):
        written.append(frame)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    if format == "mp4":
        monkeypatch.setattr(files, "pad_to_even", full)
    with pytest.raises(OSError, match="could not save .*No space left on device.*Free space") as caught:
        save(format, images=clip())
    assert caught.value.errno == errno.ENOSPC
    assert written and list((tmp_path / "clips").iterdir()) == []


def test_an_mp4_has_its_tags_before_its_frames(save):
    (path,), _ = save(images=clip())
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"workflow") < data.index(b"mdat")


@pytest.mark.parametrize("rate", [192000, 176400, 50000, 44100, 5000, 8000.0])
def test_sounds_of_any_rate_keep_their_length_and_pitch(save, rate):
    time = torch.arange(int(rate)) / rate
    sound = {"waveform": torch.sin(time * 2 * torch.pi * 440).expand(1, 2, -1), "sample_rate": rate}
    (path,), _ = save(video=InputImpl.VideoFromComponents(Types.VideoComponents(clip(8), Fraction(8), sound)))
    back = InputImpl.VideoFromFile(str(path)).get_components()
    wave, found = back.audio["waveform"][0, 0], back.audio["sample_rate"]
    assert len(back.images) == 8 and found in files.AAC_RATES
    assert len(wave) / found == pytest.approx(1, abs=1100 / found)
    loudest = int(torch.fft.rfft(wave).abs().argmax())
    assert loudest * found / len(wave) == pytest.approx(440, abs=5)


@pytest.mark.parametrize("wave", [torch.full((1, 2, 8000), float("nan")), torch.full((1, 1, 8000), 1e30),
                                  torch.zeros(1, 0, 8000), torch.zeros(1, 2, 0), torch.zeros(1, 6, 9),
                                  torch.ones(1, 2, 1)])
def test_a_strange_sound_does_not_lose_the_video(save, wave):
    sound = {"waveform": wave, "sample_rate": 8000}
    (path,), _ = save(video=InputImpl.VideoFromComponents(Types.VideoComponents(clip(8), Fraction(8), sound)))
    assert len(decode(path.read_bytes())[0]) == 8


def latent_of(clips, frames=3):
    return {"samples": torch.zeros(clips, 4, frames, 6, 8)}


@pytest.mark.parametrize("format", files.FORMATS)
def test_every_clip_of_a_batch_is_a_file_of_its_own(save, format):
    paths, out = save(format, images=torch.cat([clip(), clip().flip(2)]), latent=latent_of(2))
    names = list(dict.fromkeys((path.parent if format == "png frames" else path).name for path in paths))
    ending = {"mp4": ".mp4", "gif": ".gif", "png frames": ""}[format]
    assert names == [f"test_00001_{ending}", f"test_00002_{ending}"]
    if format == "png frames":
        shown = np.stack([np.asarray(Image.open(path)) for path in paths])
        assert np.array_equal(shown[:6], shown[6:, :, ::-1])
    assert len(out.args[0].get_components().images) == 12


def test_a_latent_of_pictures_or_of_one_clip_changes_nothing(save):
    for latent in (latent_of(1), {"samples": torch.zeros(6, 4, 6, 8)}, None):
        assert len(save(images=clip(), latent=latent)[0]) == 1


def test_a_latent_that_does_not_fit_is_refused(save, tmp_path):
    with pytest.raises(ValueError, match="6 frames were given with a latent of 4 clips"):
        save(images=clip(), latent=latent_of(4))
    with pytest.raises(ValueError, match="beside a video"):
        save(video="a video", latent=latent_of(4))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("format", files.FORMATS)
def test_a_cancel_is_heard_between_frames(save, tmp_path, monkeypatch, format):
    seen, interrupt = [], comfy.model_management.interrupt_current_processing
    encode = np.ascontiguousarray if format == "mp4" else Image.fromarray

    def stop_at_the_third(*given, **more):
        seen.append(given)
        interrupt(len(seen) == 3)
        return encode(*given, **more)

    monkeypatch.setattr(np if format == "mp4" else Image, encode.__name__, stop_at_the_third)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(format, images=clip(20))
    assert len(seen) == 3 and list((tmp_path / "clips").iterdir()) == []


def test_rgba_and_out_of_range_values_are_clamped():
    images = torch.cat([clip() * 3 - 1, torch.full((6, 48, 64, 1), 0.5)], -1)
    frames = list(files.frames_uint8(images))
    assert np.array_equal(np.stack(frames), ((clip() * 3 - 1).clamp(0, 1) * 255).round().byte().numpy())
