"""Blocks decoded as they finish compared with videos decoded at once; the MP4 that is written block by block."""

import gc
import io
from functools import cache
from types import SimpleNamespace

import av
import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import comfy.taesd.taehv
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from causal_wan_stub import (
    HEIGHT,
    WIDTH,
    conditioning,
    draw,
    latent,
    load,
    make_run,
    sample,
    settings,
    strong_tensors,
)
from core_calls import with_hidden
from PIL import Image
from stillmotion.nodes.causal_wan import nodes_sampling as nodes
from stillmotion.nodes.causal_wan.conditioning import CHUNK, CLAMP, StartFrames
from stillmotion.nodes.causal_wan.live import LiveDecoder, MovingPicture, check_vae, decode_bytes
from stillmotion.nodes.causal_wan.run import prepare
from stillmotion.nodes.common.demo import DYNAMICRAFTER as DEMO
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.common.video import encode_mp4, frames_uint8
from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


@cache
@torch.inference_mode(False)
def wan_vae():
    """Core's Wan 2.1 VAE with width 4."""
    with torch.device("meta"):
        network = comfy.ldm.wan.vae.WanVAE(dim=4, z_dim=16, temperal_downsample=[False, True, True])
    return comfy.sd.VAE(sd=random_weights(network), dtype=torch.float32)


@cache
@torch.inference_mode(False)
def tiny_vae(channels=16, weights=torch.float32):
    """Core's TAEHV: taew2_1 and lighttaew2_1 (16 channels), lighttaew2_2 (48)."""
    with torch.device("meta"):
        network = comfy.taesd.taehv.TAEHV(latent_channels=channels)
    found = {key: value.to(weights) for key, value in random_weights(network).items()}
    return comfy.sd.VAE(sd=found, dtype=torch.float32)


def random_weights(network):
    """Random weights for a network's shapes that preserve the signal's scale."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in network.state_dict().items():
        scale = 1.0 if key.endswith("gamma") else value[0].numel() ** -0.5
        weights[key] = scale * torch.randn(value.shape, generator=generator)
    return weights


@cache
@torch.inference_mode(False)
def demo_vae():
    return dynamicrafter.load(read_checkpoint(DEMO))[3]


VAES = {"wan": wan_vae, "tiny": tiny_vae, "demo": demo_vae}
KINDS = {"wan": "t2v", "tiny": "t2v", "demo": "small"}


def loaded(name):
    vae = VAES[name]()
    comfy.model_management.load_models_gpu([vae.patcher])
    return vae


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("blocks", [(1, 3, 3), (3, 3, 1), (2, 2, 2), (1, 1, 1), (7,)])
def test_blocks_decode_to_the_frames_of_the_whole_video(name, blocks):
    vae = loaded(name)
    latent_CTHW = draw(1, vae.latent_channels, sum(blocks), 6, 8)
    decoder = LiveDecoder(vae)
    found = torch.cat([decoder.decode(part) for part in latent_CTHW.split(blocks, dim=1)])
    whole = vae.decode(latent_CTHW[None])[0]
    factor = vae.temporal_compression_decode() or 1
    assert found.shape == whole.shape == (1 + factor * (sum(blocks) - 1), 48, 64, 3)
    assert found.dtype == torch.float32 and (found - whole).abs().max() < 1e-5 and whole.std() > 0.05


@pytest.mark.parametrize("name", ["wan", "tiny"])
def test_without_the_carried_state_the_frames_would_differ(name):
    vae = loaded(name)
    latent_CTHW = draw(1, 16, 6, 6, 8)
    decoder, alone = LiveDecoder(vae), LiveDecoder(vae)
    decoder.decode(latent_CTHW[:, :3])
    assert (decoder.decode(latent_CTHW[:, 3:])[-9:] - alone.decode(latent_CTHW[:, 3:])).abs().mean() > 1e-2


@pytest.mark.parametrize("channels, weights", [(16, torch.float16), (48, torch.float32)])
def test_tiny_vaes_scale_and_shuffle_as_core_does(channels, weights):
    """Core treats 16 channels in half precision as HunyuanVideo's tiny VAE, whose latents are scaled."""
    vae = tiny_vae(channels, weights)
    comfy.model_management.load_models_gpu([vae.patcher])
    latent_CTHW = draw(1, channels, 3, 6, 8)
    decoder = LiveDecoder(vae)
    found = torch.cat([decoder.decode(part) for part in latent_CTHW.split(1, dim=1)])
    assert found.std() > 0.05 and (found - vae.decode(latent_CTHW[None])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["wan", "tiny"])
def test_small_weight_types_are_used_as_they_are(name):
    with torch.inference_mode(False):
        weights = {key: value.clone() for key, value in VAES[name]().get_sd().items()}
        vae = comfy.sd.VAE(sd=weights, dtype=torch.bfloat16)
    comfy.model_management.load_models_gpu([vae.patcher])
    latent_CTHW = draw(1, 16, 5, 4, 4)
    found, whole = LiveDecoder(vae).decode(latent_CTHW), vae.decode(latent_CTHW[None])[0]
    assert found.dtype == torch.float32 and (found - whole).abs().mean() < 1e-3


@pytest.mark.parametrize("change, words", [
    ({"first_stage_model": torch.nn.Linear(1, 1), "latent_dim": 3}, "is a Linear, .* block by block .* lighttaew2_1"),
    ({"first_stage_model": torch.nn.Linear(1, 1), "latent_dim": 2, "latent_channels": 4}, "decodes 4 channels, .* 16"),
])
def test_vaes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        check_vae(SimpleNamespace(**change), 16)
    with pytest.raises(ValueError, match="decodes 4 channels"):
        make_run(vae=demo_vae())


def test_the_moving_picture_is_one_that_browsers_play():
    frames = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 30, 60, 3)
    buffer = io.BytesIO(b"HEAD")
    buffer.seek(4)
    MovingPicture(frames, 40).save(buffer, format="PNG", quality=95, compress_level=1)  # as ComfyUI calls it
    found = Image.open(io.BytesIO(buffer.getvalue()[4:]))
    assert found.n_frames == 5 and found.size == (40, 20)
    for index in range(5):
        found.seek(index)
        assert found.convert("RGB").getpixel((5, 5)) == (round(255 * index / 4),) * 3


WIDGETS = dict(seed=3, steps="1000, 500", first_steps="", shift=5.0, warp=True, block=2, independent_first=False,
               short_last_block=False, window=4, sink=1, endless=False, context_noise=0.0, cfg=2.0, refresh_sink=False)


def run_node(name, batch=1, **changes):
    kind = KINDS[name]
    return nodes.BlockAutoregressiveSampler.execute(
        load(strong_tensors(kind), weight_dtype="fp32"), conditioning(kind, 6, 1), conditioning(kind, 6, 2),
        latent(kind, 6, batch), **WIDGETS, **changes).result[0]["samples"]


@pytest.mark.parametrize("name", VAES)
def test_the_node_shows_every_finished_block(name, monkeypatch):
    plain, told = run_node(name, batch=2), []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, **_: told.append((value, total, preview)))
    found = run_node(name, batch=2, vae=VAES[name]())
    assert torch.equal(found, plain)
    steps = [(value, total) for value, total, _ in told]
    assert steps == sorted(steps) and steps[0] == (1, 6)  # newer releases skip some steps in quick succession
    pictures = [preview for _, _, preview in told if preview is not None]
    assert [step for step, (_, _, preview) in zip(steps, told) if preview is not None] == [(2, 6), (4, 6), (6, 6)]
    whole = VAES[name]().decode(found[:1])[0].clamp(0, 1)
    shown = []
    for kind, picture, size in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format=kind)
        assert size is None
        with Image.open(buffer) as moving:
            for index in range(moving.n_frames):
                moving.seek(index)
                shown.append(np.asarray(moving.convert("RGB")))
    assert np.abs(np.stack(shown) / 255.0 - whole.numpy()).max() < 0.01


def test_the_vae_is_loaded_once_with_the_model_and_counted(monkeypatch):
    asked, real = [], comfy.model_management.load_models_gpu
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, memory_required=0, **rest: (
        asked.append((set(models), memory_required)), real(models, memory_required=memory_required, **rest)))
    vae = wan_vae()
    plain, run = make_run(frames=6, window=4), make_run(frames=6, window=4, vae=vae)
    decoder = LiveDecoder(vae)
    plain.sample()
    run.sample(show=decoder.decode)
    assert decode_bytes(vae, (1, 16, 6, HEIGHT, WIDTH)) == vae.memory_used_decode((1, 16, 1, HEIGHT, WIDTH),
                                                                                 torch.float32)
    model = run.guider.model_patcher
    cache = 4 * 2 * 3 * 2 * 48 * 2 * 4  # frames, rows, columns, keys and values, width, layers, bytes
    text = 6 * 2 * 48 * 2 * 4    # tokens, keys and values, width, layers, bytes
    step = model.model.memory_required([2, 16, 2, HEIGHT, WIDTH])
    decode = decode_bytes(vae, (HEIGHT, WIDTH))
    assert asked == [({plain.guider.model_patcher}, step + cache + text),
                     ({model, vae.patcher}, max(step, decode) + cache + text)] and decode > step


@pytest.fixture
def to_file(tmp_path, monkeypatch):
    """Run the file node as ComfyUI does; returns the saved frames [N, H, W, 3] and the path."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))

    def run(name="wan", frames=6, batch=1, model=None, **changes):
        node = with_hidden(nodes.BlockAutoregressiveToFile, {"1": {"class_type": "prompt"}}, {})
        kind = KINDS[name]
        given = {**WIDGETS, "length": 0, "filename_prefix": "long/clip", "fps": 12.0, "crf": 1, **changes}
        out = node.execute(model or load(strong_tensors(kind), weight_dtype="fp32"), conditioning(kind, frames, 1),
                           conditioning(kind, frames, 2), latent(kind, frames, batch), vae=VAES[name](), **given)
        shown, = out.ui["images"]
        path = tmp_path / shown["subfolder"] / shown["filename"]
        found, tags = read_mp4(str(path))
        assert '"prompt"' in tags["prompt"]
        return found, path

    return run


def read_mp4(file):
    """(frames [N, H, W, 3], tags)"""
    with av.open(file) as container:
        assert container.streams.video[0].average_rate == 12
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), container.metadata


def through_mp4(images):
    return read_mp4(io.BytesIO(encode_mp4(frames_uint8(images), 12, crf=1)))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", VAES)
def test_the_file_holds_the_frames_of_the_whole_video(name, to_file, tmp_path):
    found, path = to_file(name)
    expected, _ = through_mp4(VAES[name]().decode(run_node(name))[0])
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 0.1
    assert files(tmp_path) == ["long/clip_00001_.mp4"] and path.name == "clip_00001_.mp4"


def test_the_video_may_be_longer_than_the_latent(to_file):
    found, _ = to_file(frames=1, length=29, window=4)
    assert len(found) == 29
    expected, _ = through_mp4(wan_vae().decode(sample(frames=8, window=4, sink=1, cfg=2.0))[0])
    assert np.abs(found.astype(int) - expected).mean() < 0.1


@pytest.mark.parametrize("start", [StartFrames(CHUNK, 2, 2, True), StartFrames(CLAMP, 1, 2, False),
                                   StartFrames(CHUNK, 4, 2, False)], ids=str)
def test_a_short_latent_begins_a_longer_video(start):
    model, texts = load(strong_tensors(), weight_dtype="fp32"), [conditioning("t2v", 8, seed) for seed in (1, 2)]
    long = latent("t2v", 8, start=start)
    short = {**long, "samples": long["samples"][:, :, :max(1, start.frames)]}
    cut = 1 if start.still else 0
    parts = []
    run = prepare(model, *texts, short, None, 3, settings(window=4, sink=1), wan_vae(), 1 + 4 * (7 - cut))
    run.stream(None, None, parts.append)
    whole = prepare(model, *texts, long, None, 3, settings(window=4, sink=1)).sample()["samples"][0]
    assert torch.equal(torch.cat(parts, dim=1), whole) and whole.shape[1] == 8 - cut


@pytest.mark.parametrize("place", ["os.link", "stillmotion.nodes.common.video.pad_to_even"])
def test_a_full_disk_leaves_no_file_and_gives_advice(place, to_file, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, fail)
    with pytest.raises(OSError, match="clip_00001_.mp4: No space left.*Free space on the disk"):
        to_file()
    assert files(tmp_path) == []


def test_an_interrupted_file_leaves_nothing_and_is_made_whole_from_the_stored_blocks(to_file, tmp_path):
    _, whole = to_file()
    model, calls = load(strong_tensors(), weight_dtype="fp32"), []

    def stop(apply, given):
        calls.append(None)
        if len(calls) == 9:  # two branches: after the first block, in the second
            comfy.model_management.interrupt_current_processing(True)
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(stop)
    for change in ({}, {"resume_folder": "runs/a"}):
        calls.clear()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            to_file(model=model, **change)
    assert files(tmp_path) == ["long/clip_00001_.mp4", "runs/a/block_000000.safetensors"]
    _, again = to_file(model=model, resume_folder="runs/a")
    assert again.name == "clip_00002_.mp4" and again.read_bytes() == whole.read_bytes()


def test_a_video_until_stopped_is_kept_when_the_run_is_cancelled(to_file, tmp_path):
    model, calls = load(strong_tensors(), weight_dtype="fp32"), []

    def stop(apply, given):
        calls.append(None)
        if len(calls) == last:
            comfy.model_management.interrupt_current_processing(True)
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(stop)
    last = 15  # two branches, three evaluations a block: in the third
    found, path = to_file(model=model, frames=1, length=-1)
    expected, _ = through_mp4(wan_vae().decode(sample(frames=4, window=4, sink=1, cfg=2.0))[0])
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 0.1
    calls.clear()
    last = 3  # before the first block is finished there is nothing to keep
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        to_file(model=model, frames=1, length=-1)
    assert files(tmp_path) == [str(path.relative_to(tmp_path))]


@pytest.mark.parametrize("change, words", [
    ({"batch": 2}, "batch of 2 videos, but a file holds one"),
    ({"length": 30}, "length is 30 frames. This VAE takes 1 . 4 n. Nearest: 29 or 33"),
    ({"length": -1, "resume_folder": "a"}, "until stopped cannot be resumed"),
    ({"length": -1, "window": -1}, "until stopped needs a window"),
    ({"length": 25}, "7 latent frames do not split into blocks of 2"),
    ({"name": "demo", "length": 8}, "image latent .y. was made for 6: give Causal Wan Image to Video this length"),
    ({"fps": 0.0}, "fps = 0"),
    ({"crf": 0}, "crf = 0"),
])
def test_bad_input_is_refused_before_the_first_step(change, words, to_file, tmp_path):
    model = load(strong_tensors(KINDS[change.get("name", "wan")]), weight_dtype="fp32")
    model.set_model_unet_function_wrapper(lambda *_: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match=words):
        to_file(model=model, **change)
    assert files(tmp_path) == []


def held_bytes():
    gc.collect()
    return sum(found.nbytes for found in gc.get_objects()
               if issubclass(type(found), torch.Tensor) and found.layout == torch.strided)


@pytest.mark.parametrize("name", ["wan", "tiny"])
def test_nothing_of_a_long_video_is_held(name):
    vae = VAES[name]()
    run = make_run(frames=1, length=1 + 4 * 29, vae=vae, block=1, window=4, sink=1, steps="1000", endless=True)
    held, decoder, count = [], LiveDecoder(vae), 0

    def show(part_CFHW):
        nonlocal count
        count += len(decoder.decode(part_CFHW)) // 4
        if count in (9, 29):
            held.append(held_bytes())

    run.stream(None, None, show)
    assert count == 29 and len(held) == 2 and held[0] == held[1]
