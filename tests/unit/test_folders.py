"""Video folders: what is read, resampled and resized, and what is skipped or rejected."""
import codecs
import logging
import os
import struct
import tracemalloc
from fractions import Fraction
from random import Random

import av
import numpy as np
import pytest
import torch
from PIL import Image
from stillmotion.nodes.common.images import fit_image
from stillmotion.nodes.common.video import encode_gif, encode_mp4, encode_png
from stillmotion.nodes.training.data import shapes as data
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.data.folders import VideoFolder, write_shapes
from stillmotion.nodes.training.data.frames import look, pick_times, read_frames
from torch.utils.data import DataLoader


def counting(frames=16, height=48, width=64):
    """Frames whose grey level is 10 times their number."""
    return [np.full((height, width, 3), 10 * i, np.uint8) for i in range(frames)]


def levels(video_CTHW):
    """The number of each frame of a `counting` clip."""
    return ((video_CTHW.mean((0, 2, 3)) + 1) * 12.75).round().int().tolist()


def read_all(path):
    """All frames of a clip at its original size."""
    found = look(path)
    return read_frames(path, found, list(found.times), found.size)


def add(folder, name, content, caption="grey grows brighter"):
    (folder / "videos").mkdir(exist_ok=True, parents=True)
    (folder / "captions").mkdir(exist_ok=True)
    (folder / "videos" / name).write_bytes(content)
    if caption is not None:
        (folder / "captions" / f"{name.rpartition('.')[0]}.txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    add(tmp_path, "a.mp4", encode_mp4(counting(), 8))
    add(tmp_path, "b.gif", encode_gif(counting(12), 8), "  two\nlines ")
    return tmp_path


def test_clips_and_captions_belong_together_by_name(folder):
    clips = VideoFolder(folder, frames=8, size=(32, 32))
    assert [(item["name"], item["caption"]) for item in clips] == [
        ("a.mp4", "grey grows brighter"), ("b.gif", "two lines")]
    item = clips[0]
    assert item["video"].shape == (3, 8, 32, 32) and item["video"].dtype == torch.float32
    assert levels(item["video"]) == [0, 2, 4, 6, 9, 11, 13, 15]
    assert levels(clips[1]["video"]) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert clips.skipped == [] and "2 clips" in clips.summary() and "skipped" not in clips.summary()


def test_stride_keeps_the_speed_and_begins_anywhere(folder):
    clips = VideoFolder(folder, frames=4, size=(32, 32), stride=3)
    begins = set()
    for epoch in range(12):
        clips.set_epoch(epoch)
        numbers = levels(clips[0]["video"])
        begins.add(numbers[0])
        assert np.diff(numbers).tolist() == [3, 3, 3]
    assert len(begins) > 3 and max(begins) <= 6


@pytest.mark.parametrize("count, frames, stride, expected", [
    (16, 16, 0, list(range(16))), (9, 3, 0, [0, 4, 8]), (7, 1, 0, [0]), (5, 3, 2, [0, 2, 4])])
def test_picked_frames(count, frames, stride, expected):
    times = tuple(0.25 * number for number in range(count))
    assert pick_times(times, frames, stride, Random(0)) == [0.25 * number for number in expected]


def test_nothing_is_stretched():
    frames = torch.zeros(2, 40, 100, 3, dtype=torch.uint8)
    frames[:, 10:30, 40:60] = 255  # a square in the middle
    fitted = fit_image(frames, 20, 20)
    bright = fitted[0, ..., 0] > 0.5
    assert fitted.shape == (2, 20, 20, 3) and bright.any(0).sum() == bright.any(1).sum() == 10
    assert fit_image(frames, 40, 80).shape == (2, 80, 40, 3)
    assert torch.equal(fit_image(frames, 100, 40), frames / 255)
    wide = fit_image(frames, 20, 20, pixel_aspect=2.0)[0, ..., 0] > 0.5
    assert (wide.any(0).sum(), wide.any(1).sum()) == (20, 10)


def test_a_picture_reaches_the_model_as_it_does_in_sampling(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (48, 70, 3), np.uint8)
    add(tmp_path, "a.png", encode_png(picture))
    video = VideoFolder(tmp_path, frames=1, size=(32, 32))[0]["video"]
    image_BHWC = torch.from_numpy(picture)[None].float() / 255  # as Load Image returns it
    assert torch.allclose(video[:, 0].movedim(0, -1) / 2 + 0.5, fit_image(image_BHWC, 32, 32)[0], atol=1e-6)


def test_colours_survive_the_file(tmp_path):
    clip = MovingShapes(1).clip(0)[0]
    drawn = data.draw_clip(clip, 8)
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(drawn.numpy(), 8, crf=4))
    assert (read_all(tmp_path / "clip.mp4") - drawn).abs().mean() < 2


def test_a_folder_of_numbered_images_is_a_clip(tmp_path):
    add(tmp_path, "x.gif", encode_gif(counting(2), 8))
    sequence = tmp_path / "videos" / "sequence"
    sequence.mkdir()
    for i, frame in enumerate(counting(12)):
        (sequence / f"frame_{i}.png").write_bytes(encode_png(frame))  # 10 sorts before 2 as text
    (sequence / "notes.txt").write_text("not a frame")
    (tmp_path / "captions" / "sequence.txt").write_text("from pictures")
    clips = VideoFolder(tmp_path, frames=12, size=(32, 32))
    assert levels(clips[0]["video"]) == list(range(12)) and clips[0]["caption"] == "from pictures"
    (sequence / "frame_5.png").write_bytes(encode_png(counting(1, 20, 20)[0]))
    with pytest.raises(ValueError, match="not one of 1 clips"):
        clips[0]


def test_single_images_are_clips_of_one_frame(tmp_path):
    add(tmp_path, "still.png", encode_png(counting(8)[7]))
    assert levels(VideoFolder(tmp_path, frames=1, size=(16, 16))[0]["video"]) == [7]
    with pytest.raises(ValueError, match="has 1 of the 2 frames needed"):
        VideoFolder(tmp_path, frames=2)


def test_phone_videos_are_read_upright(tmp_path):
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = 255  # top left
    film = bytearray(encode_mp4(frames, 8))
    matrix = film.index(b"tkhd") + 44
    film[matrix:matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # 90 degrees clockwise
    (tmp_path / "phone.mp4").write_bytes(film)
    read = read_all(tmp_path / "phone.mp4")
    assert read.shape == (2, 64, 32, 3) and read[0, :32, 16:].mean() > 200  # top right


def write_at(path, times, frames, rate=100, **settings):
    """Frames [H, W, 3] with time stamps in seconds, as an MP4 of variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "4", "bf": "0", **settings}
        stream.codec_context.time_base = Fraction(1, rate)
        for time, frame in zip(times, frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(time * rate), Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def test_frames_lie_evenly_in_time_whatever_the_rate(tmp_path):
    add(tmp_path, "a.mp4", b"", "a")
    times = [i * 0.1 for i in range(20)] + [2 + i for i in range(9)]  # 2 s at 10 fps, then 8 s at 1 fps
    write_at(tmp_path / "videos" / "a.mp4", times, [np.full((32, 32, 3), round(time * 20), np.uint8) for time in times])
    video = VideoFolder(tmp_path, 11, (32, 32))[0]["video"]
    seconds = (video.mean((0, 2, 3)) + 1) * 127.5 / 20
    assert (seconds - torch.arange(11)).abs().max() < 0.1
    clips = VideoFolder(tmp_path, 3, (32, 32), stride=5)  # five mean frame lengths of 0.36 s apart
    seconds = (clips[0]["video"].mean((0, 2, 3)) + 1) * 127.5 / 20
    assert (seconds.diff() - 5 * 10 / 28).abs().max() <= 1  # where one frame lasts a second


def test_circles_of_clips_with_oblong_pixels_stay_round(tmp_path):
    frame = np.zeros((108, 144, 3), np.uint8)
    y, x = np.mgrid[:108, :144]
    frame[((x - 71.5) * 4 / 3) ** 2 + (y - 53.5) ** 2 < 30 ** 2] = 255  # stored narrow, displayed round
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 108, 144, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = look(path)
    assert found.size == (108, 192)
    bright = read_frames(path, found, [0.0], (96, 96))[0, ..., 0] > 128
    assert abs(bright.any(0).sum() / bright.any(1).sum() - 1) < 0.06


def test_a_recording_that_begins_between_two_key_frames(tmp_path):
    path = tmp_path / "a.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt, stream.options = "yuv420p", {"g": "10", "bf": "2"}
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 8 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        cut = [packet.pos for packet in container.demux(video=0)][5] // 188 * 188
    path.write_bytes(path.read_bytes()[cut:])
    levels = read_all(path).mean((1, 2, 3)) / 8
    assert levels.round().tolist() == list(range(10, 30))


def test_a_film_whose_first_packets_cannot_be_decoded(tmp_path):
    path = tmp_path / "a.mp4"
    write_at(path, [i * 0.1 for i in range(15)], [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(15)], g="5")
    with av.open(str(path)) as container:
        spots = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][:5]
    film = bytearray(path.read_bytes())
    for pos, size in spots:
        film[pos:pos + size] = b"\xff" * size
    path.write_bytes(film)
    assert look(path).times[0] == pytest.approx(0.5)
    assert (read_all(path).mean((1, 2, 3)) / 10).round().tolist() == list(range(5, 15))


def test_avi_is_read_in_the_order_of_its_frames(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt, stream.options = "yuv420p", {"bf": "2", "crf": "4"}
        for frame in counting(16, 64, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert (read_all(path).mean((1, 2, 3)) / 10).round().tolist() == list(range(16))


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.png"])
def test_animated_pictures_are_clips(tmp_path, name):
    pictures = [Image.fromarray(frame) for frame in counting(6)]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=[100] * 5 + [500],
                     lossless=True)
    found = look(tmp_path / name)
    assert found.times == pytest.approx([0.1 * i for i in range(6)]) and found.size == (48, 64)
    assert (read_all(tmp_path / name).mean((1, 2, 3)) / 10).round().tolist() == list(range(6))


def test_hidden_files_and_what_is_no_file(folder):
    clip = folder / "videos" / "clip"
    clip.mkdir()
    (folder / "captions" / "clip.txt").write_bytes(codecs.BOM_UTF8 + b"from pictures")
    (folder / "captions" / "clip.txt").rename(folder / "captions" / "clip.TXT")
    for i in range(8):
        Image.fromarray(counting()[i]).save(clip / f"{i}.webp", lossless=True)
    for path in ("videos/._a.mp4", "videos/clip/._0.webp", "captions/._a.txt", "videos/Thumbs.db"):
        (folder / path).write_bytes(b"no data")
    clips = VideoFolder(folder, frames=8, problems="refuse")
    assert [item["name"] for item in clips] == ["a.mp4", "b.gif", "clip"] and clips.skipped == []
    assert clips[2]["caption"] == "from pictures" and levels(clips[2]["video"]) == list(range(8))
    os.mkfifo(folder / "videos" / "pipe.mp4")
    os.mkfifo(folder / "videos" / "clip" / "8.webp")
    os.mkfifo(folder / "captions" / "pipe.txt")
    (clip / "9.heic").write_bytes(b"of a phone")
    found = dict(VideoFolder(folder, frames=8).skipped)
    assert found.keys() == {"pipe.mp4", "clip/8.webp", "clip/9.heic", "captions/pipe.txt"}


@pytest.mark.parametrize("text", [
    "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:3,\n{other}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {other}\n"])
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4"])
def test_a_playlist_leads_to_no_other_file(tmp_path, text, name):
    (tmp_path / "other.mp4").write_bytes(encode_mp4(counting(), 8))
    for other in (tmp_path / "other.mp4", "other.mp4"):
        (tmp_path / name).write_text(text.format(other=other))
        with pytest.raises(ValueError, match="no video"):
            look(tmp_path / name)


def test_large_frames_are_fitted_one_by_one(tmp_path):
    add(tmp_path, "a.gif", encode_gif(counting(12, 1024, 1024), 8), "large")
    clips = VideoFolder(tmp_path, frames=12, size=(32, 32))
    tracemalloc.start()
    clips[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 3 * 1024 ** 2 * 2


def make_bad(folder):
    """Add one file per problem to the good clips of the fixture."""
    film = encode_mp4(counting(height=64), 8)
    add(folder, "cut.mp4", film[:len(film) * 2 // 3])
    add(folder, "empty.mp4", b"")
    add(folder, "note.txt", b"a text, no video\n" * 50)
    add(folder, "silent.mp4", encode_mp4(counting(), 8), None)
    add(folder, "blank.mp4", encode_mp4(counting(), 8), " \n")
    add(folder, "short.mp4", encode_mp4(counting(7), 8))
    add(folder, "latin.mp4", encode_mp4(counting(), 8))
    (folder / "captions" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "captions" / "nobody.txt").write_text("no video")
    return {"cut.mp4": "cut off", "empty.mp4": "cut off, or no video", "note.txt": "no video",
            "short.mp4": "7 of the 8", "silent.mp4": "no captions/silent.txt", "blank.mp4": "blank.txt is empty",
            "latin.mp4": "not UTF-8", "captions/nobody.txt": "no video of this name"}


def test_bad_clips_are_skipped_counted_and_named(folder, caplog):
    expected = make_bad(folder)
    clips = VideoFolder(folder, frames=8)
    assert [clip.path.name for clip in clips.clips] == ["a.mp4", "b.gif"]
    found = dict(clips.skipped)
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found[name], (name, found[name])
        assert f"- {name}: " in clips.summary() and name in caplog.text
    assert f"{len(expected)} skipped" in clips.summary()


def test_bad_clips_are_refused_all_at_once(folder):
    expected = make_bad(folder)
    with pytest.raises(ValueError) as error:
        VideoFolder(folder, frames=8, problems="refuse")
    assert f"{len(expected)} refused" in str(error.value)
    assert all(f"- {name}: " in str(error.value) for name in expected)


def test_a_film_cut_behind_its_index_is_found_without_decoding(tmp_path):
    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        for frame in np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert len(look(path).times) == 8
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cut off or damaged"):
        look(path)


def test_mixed_sizes_are_fitted_skipped_or_refused(folder):
    add(folder, "tall.mp4", encode_mp4(counting(height=80), 8))
    assert len(VideoFolder(folder, frames=8)) == 3
    clips = VideoFolder(folder, frames=8, sizes="same")
    assert clips.skipped == [("tall.mp4", "64x80 pixels, most are 64x48")] and len(clips) == 2
    with pytest.raises(ValueError, match="1 refused:\n- tall.mp4: 64x80"):
        VideoFolder(folder, frames=8, sizes="same", problems="refuse")


def test_a_clip_that_breaks_later_is_replaced_or_refused(folder, caplog):
    skip, refuse = (VideoFolder(folder, frames=8, problems=problems) for problems in ("skip", "refuse"))
    path = folder / "videos" / "a.mp4"
    path.write_bytes(path.read_bytes()[:500])
    assert skip[0]["name"] == "b.gif" and "a.mp4 is replaced by the next clip" in caplog.text
    with pytest.raises(ValueError, match="a.mp4: cut off"):
        refuse[0]


def test_max_samples_takes_the_first_good_clips(folder):
    add(folder, "0.mp4", b"broken")
    clips = VideoFolder(folder, frames=8, max_samples=1)
    assert [clip.path.name for clip in clips.clips] == ["a.mp4"]
    assert [name for name, _ in clips.skipped] == ["0.mp4"]
    assert len(VideoFolder(folder, frames=8, max_samples=0, sizes="same")) == 2


def test_damage_inside_a_film_is_found_by_decoding_it(folder):
    noise = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8)
    add(folder, "noise.mp4", encode_mp4(noise, 8))
    path = folder / "videos" / "noise.mp4"
    film = bytearray(path.read_bytes())
    middle = film.index(b"mdat") + (len(film) - film.index(b"mdat")) // 2
    film[middle:middle + 4000] = bytes(4000)
    path.write_bytes(film)
    (name, reason), = VideoFolder(folder, frames=8).damaged()
    assert name == "noise.mp4" and "damaged" in reason


@pytest.mark.parametrize("settings, words", [
    ({"frames": 0}, "frames = 0"), ({"stride": -1}, "stride = -1"), ({"max_samples": -2}, "max_samples = -2"),
    ({"size": (64, 4)}, "width = 4"), ({"problems": "ignore"}, "skip, refuse"), ({"sizes": "odd"}, "any, same"),
    ({"stride": 4}, "a.mp4: too short, it has 16 of the 61 frames")])
def test_settings_that_cannot_be_are_named(folder, settings, words):
    with pytest.raises(ValueError, match=words):
        VideoFolder(folder, **settings)


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="no folder videos"):
        VideoFolder(tmp_path)
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match="has no clip to train on"):
        VideoFolder(tmp_path)


def test_workers_read_each_clip_once(tmp_path, caplog):
    shapes = MovingShapes(7, frames=4)
    write_shapes(shapes, tmp_path / "shapes")
    clips = VideoFolder(tmp_path / "shapes", frames=4, mirror=True)
    with caplog.at_level(logging.ERROR):
        batches = list(DataLoader(clips, batch_size=3, num_workers=2, multiprocessing_context="fork"))
    assert [name for batch in batches for name in batch["name"]] == [f"shape_{i:05}.mp4" for i in range(7)]
    assert torch.equal(torch.cat([batch["video"] for batch in batches]), torch.stack([item["video"] for item in clips]))
