"""Start images and clips for causal Wan: frame arithmetic, masked latents with both kinds of VAE, prompt timelines."""

from types import SimpleNamespace

import comfy.ldm.wan.vae
import comfy.sd
import pytest
import torch
from causal_wan_stub import SIZES, load, tensors
from stillmotion.nodes.causal_wan import nodes_loading as nodes
from stillmotion.nodes.causal_wan.conditioning import (
    CHUNK,
    CLAMP,
    CONCAT,
    PREFIX,
    START_KEY,
    StartFrames,
    choose_mechanism,
    image_conditions,
    latent_frames,
    plan_frames,
)
from stillmotion.nodes.causal_wan.run import BlockSettings, prepare
from stillmotion.nodes.causal_wan.timeline import PromptTimeline, apply_timeline, parse_timeline, with_image
from stillmotion.nodes.common.images import fit_image
from stillmotion.nodes.common.vae import VideoVAE, vae_shapes

WIDTH, HEIGHT = 48, 32
SMALL = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
         "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def random_weights(shapes):
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def wan_vae():
    """Core's Wan 2.1 VAE at the smallest width that its file format supports."""
    with torch.device("meta"):
        network = comfy.ldm.wan.vae.WanVAE(
            dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True])
    return comfy.sd.VAE(sd=random_weights({key: value.shape for key, value in network.state_dict().items()}))


@pytest.fixture(scope="module")
def frame_vae():
    """The pack's VAE: one latent frame per video frame."""
    return VideoVAE(random_weights(vae_shapes(SMALL, 4)), SMALL, 4)


def pictures(count, height=HEIGHT, width=WIDTH):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(2))


def close(found, expected):
    assert found.shape == expected.shape
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def make(vae, images, length, block, mechanism="auto", tokens=False, short_last=False, batch=1):
    return image_conditions(vae, images, WIDTH, HEIGHT, length, block, mechanism, tokens, short_last, batch)


def test_a_prefix_frame(wan_vae):
    entries, latent = make(wan_vae, pictures(1), 13, 1, batch=2)
    assert entries == {} and latent[START_KEY] == StartFrames(PREFIX, 1, 1, False)
    samples = latent["samples"]
    assert samples.shape == (2, 16, 4, 4, 6) and not samples[:, :, 1:].any()
    for row in samples:
        close(row[None, :, :1], wan_vae.encode(pictures(1)))


def test_a_still_chunk_is_the_image_for_one_block_and_stands_before_the_video(wan_vae):
    _, latent = make(wan_vae, pictures(1), 13, 3)
    assert latent[START_KEY] == StartFrames(CHUNK, 3, 3, True)
    assert latent["samples"].shape[2] == 3 + 3  # 4 latent frames requested: the image's and one block
    close(latent["samples"][:, :, :3], wan_vae.encode(pictures(1).expand(9, -1, -1, -1)))


@pytest.mark.parametrize("mechanism, block, length", [(PREFIX, 2, 17), (CHUNK, 3, 21), (CLAMP, 6, 21)])
def test_a_clip_to_continue(wan_vae, mechanism, block, length):
    _, latent = make(wan_vae, pictures(9), length, block, mechanism)
    assert latent[START_KEY] == StartFrames(mechanism, 3, block, False)
    close(latent["samples"][:, :, :3], wan_vae.encode(pictures(9)))
    assert not latent["samples"][:, :, 3:].any()


@pytest.mark.parametrize("images", [1, 5])
def test_concat_masks_the_images_before_grey_frames(wan_vae, images):
    entries, latent = make(wan_vae, pictures(images), 13, 2, tokens=True)
    given = (images + 3) // 4
    assert latent[START_KEY] == StartFrames(CONCAT, 0, 2, False) and not latent["samples"].any()
    grey = torch.full((13 - images, HEIGHT, WIDTH, 3), 0.5)
    close(entries["concat_latent_image"], wan_vae.encode(torch.cat((pictures(images), grey))))
    mask = entries["concat_mask"]
    assert mask.shape == (1, 1, 4, 4, 6) and not mask[:, :, :given].any() and mask[:, :, given:].all()


def test_an_image_model_may_take_the_image_as_a_chunk_as_well(wan_vae):
    entries, latent = make(wan_vae, pictures(1), 13, 3, CHUNK, tokens=True)
    assert entries["concat_latent_image"].shape[2] == entries["concat_mask"].shape[2] == 6
    assert not entries["concat_mask"][:, :, :3].any() and entries["concat_mask"][:, :, 3:].all()
    close(latent["samples"][:, :, :3], entries["concat_latent_image"][:, :, :3])


def test_a_vae_of_single_frames(frame_vae):
    entries, latent = make(frame_vae, pictures(1), 8, 4, tokens=True)
    assert latent["samples"].shape == entries["concat_latent_image"].shape == (1, 4, 8, 4, 6)
    assert entries["concat_mask"].flatten(2)[0, 0].view(8, -1).amax(1).tolist() == [0] + 7 * [1]
    close(entries["concat_latent_image"][:, :, :1], frame_vae.encode(pictures(1)))
    _, latent = make(frame_vae, pictures(4), 12, 4)
    assert latent[START_KEY] == StartFrames(CHUNK, 4, 4, False)
    close(latent["samples"][:, :, :4], frame_vae.encode(pictures(4)))


@pytest.mark.parametrize("given, block, tokens, expected", [
    (1, 1, False, PREFIX), (1, 3, False, CHUNK), (3, 3, False, CHUNK), (4, 3, False, PREFIX), (1, 3, True, CONCAT)])
def test_auto(given, block, tokens, expected):
    assert choose_mechanism("auto", given, block, tokens) == expected
    assert choose_mechanism(CLAMP, given, block, tokens) == CLAMP


@pytest.mark.parametrize("frames, factor, latents", [(1, 4, 1), (5, 4, 2), (81, 4, 21), (7, 1, 7)])
def test_latent_frames(frames, factor, latents):
    assert latent_frames(frames, factor, "length") == latents


@pytest.mark.parametrize("arguments, words", [
    ((1, 81, 3, PREFIX, False, 4, False), "81 frames, which are 21 latent frames, 20 after the first one, no whole "
                                          "blocks of 3. .* 73 or 85. .* 1, 2, 4, 5, 10, 20"),
    ((1, 80, 3, PREFIX, False, 4, False), "length is 80 frames.*77 or 81"),
    ((3, 73, 3, PREFIX, False, 4, False), "image is 3 frames.*1 or 5"),
    ((1, 81, 3, CHUNK, False, 4, False), "20 after the first one, no whole blocks of 3.* 73 or 85"),
    ((1, 81, 4, CLAMP, False, 4, False), "21 latent frames, no whole blocks of 4.* 77 or 93.* 1, 3, 7, 21"),
    ((1, 81, 8, CONCAT, True, 4, False), "21 latent frames, no whole blocks of 8.* 61 or 93"),
    ((5, 73, 3, PREFIX, False, 4, False), "end inside a block of 3 with prefix frame. Give 1, 13, 25, 37 images"),
    ((5, 21, 3, CHUNK, False, 4, True), "end inside a block of 3 with still chunk. Give 9 images"),
    ((1, 5, 3, PREFIX, False, 4, False), "Lengths that fit: 13"),
    ((13, 13, 3, PREFIX, False, 4, False), "fill 4 latent frames, but the video has only 4"),
    ((1, 1, 1, "auto", False, 4, False), "video has only 1"),
    ((1, 9, 1, "zoom", False, 4, False), "mechanism is 'zoom'. Choose one of auto, prefix frame"),
    ((1, 9, 0, "auto", True, 4, False), "block is 0"),
    ((0, 81, 8, "auto", False, 4, False), "21 latent frames, no whole blocks of 8.* 61 or 93"),
    ((0, 13, 3, CHUNK, False, 4, False), "'still chunk', which needs an image"),
])
def test_bad_numbers(arguments, words):
    with pytest.raises(ValueError, match=words):
        plan_frames(*arguments)


def test_a_short_last_block_may_be_allowed():
    assert plan_frames(1, 81, 3, PREFIX, False, 4, True).latents == 21


class NoVAE:
    """Fails if anything is encoded before the checks."""

    latent_channels = 16

    def spacial_compression_encode(self):
        return 8

    def temporal_compression_decode(self):
        return 4


@pytest.mark.parametrize("changes, words", [
    ({"width": 40}, "width is 40.*multiple of 16.*32 or 48"), ({"height": 8}, "height is 8.*16 or 32"),
    ({"batch_size": 0}, "batch_size is 0"), ({"images_THWC": torch.full((1, 8, 8, 3), torch.nan)}, "192 NaN"),
    ({"length": 12}, "length is 12 frames")])
def test_bad_input_is_refused_before_anything_is_encoded(changes, words):
    arguments = {"images_THWC": pictures(1), "width": WIDTH, "height": HEIGHT, "length": 13, "block": 3,
                 "mechanism": "auto", "i2v": False, "short_last": False, "batch_size": 1}
    with pytest.raises(ValueError, match=words):
        image_conditions(NoVAE(), **arguments | changes)


def test_from_text_alone_nothing_is_encoded_and_the_latent_is_empty():
    entries, latent = image_conditions(NoVAE(), None, WIDTH, HEIGHT, 21, 3, "auto", False, False, 2)
    assert not entries and latent["samples"].shape == (2, 16, 6, 4, 6) and not latent["samples"].any()
    for length in (21, 25):  # 6 frames, or 1 + 6
        assert plan_frames(0, length, 3, "auto", True, 4, False).start is None


def test_an_image_to_video_model_without_image_gets_grey_frames_that_are_not_given(frame_vae):
    entries, latent = image_conditions(frame_vae, None, WIDTH, HEIGHT, 6, 3, "auto", True, False, 1)
    assert entries["concat_mask"].min() == 1 and latent["samples"].shape == (1, 4, 6, 4, 6)
    grey = frame_vae.encode(torch.full((1, HEIGHT, WIDTH, 3), 0.5))
    assert torch.allclose(entries["concat_latent_image"], grey.expand(-1, -1, 6, -1, -1), atol=1e-5)


@pytest.mark.parametrize("old", [(100, 100), (20, 64), (64, 20)])
def test_images_are_cropped_and_never_stretched(old):
    height, width = old
    y, x = torch.meshgrid(torch.arange(height) - height / 2, torch.arange(width) - width / 2, indexing="ij")
    circle = ((x * x + y * y).sqrt() < min(old) / 4).float()[None, :, :, None].repeat(1, 1, 1, 4)
    shape_HW = fit_image(circle, 64, 64)[0, ..., 0] > 0.5
    assert shape_HW.shape == (64, 64)
    assert abs(shape_HW.any(1).sum() - shape_HW.any(0).sum()) <= 3
    fitting = pictures(1)
    assert torch.equal(fit_image(fitting, WIDTH, HEIGHT), fitting)


def test_timelines_are_read():
    assert parse_timeline("0: a circle: red\n\n  12 : moves up ") == [(0, "a circle: red"), (12, "moves up")]


@pytest.mark.parametrize("text, words", [
    ("", "is empty"), ("a red circle", "'a red circle' has no start frame"), ("-1: a", "has no start frame"),
    ("3: a\n3: b", "3, 3.*later"), ("0: a\n6: b\n3: c", "0, 6, 3.*in order")])
def test_bad_timelines(text, words):
    with pytest.raises(ValueError, match=words):
        parse_timeline(text)


def test_prompts_of_a_timeline_take_the_image_of_the_positive_one():
    positive = [["text", {"concat_mask": 1, "pooled_output": 2}]]
    later = ([["a", {"pooled_output": 3}]], [["b", {}]])
    prompts, switches = apply_timeline(PromptTimeline((4, 8), later), positive, 9)
    assert [with_image(positive, prompt) for prompt in prompts] == [
        positive, [["a", {"concat_mask": 1, "pooled_output": 3}]], [["b", positive[0][1]]]]
    assert switches == (4, 8)
    prompts, switches = apply_timeline(PromptTimeline((0, 8), later), positive, 9)
    assert [prompt[0][0] for prompt in prompts] == ["a", "b"] and switches == (8,)
    with pytest.raises(ValueError, match="latent frame 8, but this video has the latent frames 0 to 7"):
        apply_timeline(PromptTimeline((4, 8), later), positive, 8)


@pytest.mark.parametrize("kind, tokens, expected", [("t2v", True, CHUNK), ("i2v", False, CONCAT)])
def test_auto_goes_by_the_model_where_one_is_connected(wan_vae, kind, tokens, expected):
    text = StubClip().encode_from_tokens_scheduled(1)
    arguments = (text, text, wan_vae, WIDTH, HEIGHT, 13, 3, "auto", False, 1, pictures(1), Tower() if tokens else None)
    positive, _, latent = nodes.CausalWanImageToVideo.execute(*arguments, model=load(tensors(kind))).result
    assert latent[START_KEY].mechanism == expected
    assert ("concat_mask" in positive[0][1]) == (kind == "i2v")
    with pytest.raises(ValueError, match="not a causal Wan"):
        nodes.CausalWanImageToVideo.execute(*arguments, model=SimpleNamespace(model=torch.nn.Linear(1, 1)))


def test_grey_pictures_have_three_channels_afterwards():
    assert fit_image(torch.rand(1, 20, 20, 1), 16, 16).shape == (1, 16, 16, 3)


class StubClip:
    def tokenize(self, text):
        return len(text)

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.full((1, 4, 24), float(tokens)), {}]]


class Tower:
    penultimate_hidden_states = torch.ones(1, 5, 20)


class Eye:
    """A vision tower that returns what it was shown."""

    def encode_image(self, image_BHWC):
        return image_BHWC


@pytest.mark.parametrize("image", [pictures(5), None])
def test_the_vision_tower_sees_the_first_image_or_grey(wan_vae, image):
    text = StubClip().encode_from_tokens_scheduled(1)
    given = dict(positive=text, negative=text, vae=wan_vae, width=WIDTH, height=HEIGHT, length=17, block=2,
                 mechanism="in-block clamp" if image is not None else "auto", short_last_block=True, batch_size=1)
    positive = nodes.CausalWanImageToVideo.execute(**given, image=image, clip_vision=Eye()).result[0]
    seen = positive[0][1]["clip_vision_output"]
    assert torch.equal(seen, image[:1]) if image is not None else (seen == 128 / 255).all() and len(seen) == 1


def test_size_0_is_that_of_the_published_models(wan_vae, monkeypatch):
    found = []
    monkeypatch.setattr(nodes, "image_conditions", lambda vae, image, *size, **_: found.append(size[:2]) or ({}, {}))
    text = StubClip().encode_from_tokens_scheduled(1)
    nodes.CausalWanImageToVideo.execute(text, text, wan_vae, 0, 0, 17, 2, "auto", False, 1)
    assert found == [(832, 480)]


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("kind, given", [("t2v", {}), ("i2v", {"clip_vision_output": Tower()})])
def test_the_nodes_together_make_a_video(wan_vae, kind, given, image):
    text = StubClip().encode_from_tokens_scheduled(1)
    positive, negative, latent = nodes.CausalWanImageToVideo.execute(
        text, text, wan_vae, WIDTH, HEIGHT, 17, 2, "auto", False, 2, pictures(1) if image else None, **given).result
    assert ("concat_mask" in positive[0][1]) == ("concat_mask" in negative[0][1]) == bool(given)
    timeline = nodes.PromptTimelineNode.execute(StubClip(), "0: a\n3: bcd").result[0]
    settings = BlockSettings(steps="1000, 500", first_steps="", shift=5.0, warp=True, block=2,
                             independent_first=True, short_last=False, window=4, sink=1, endless=False,
                             context_noise=0.0, cfg=2.0, global_sink=True)
    model = load(tensors(kind), weight_dtype="fp32")
    result = prepare(model, positive, negative, latent, timeline, 0, settings).sample()
    assert result.keys() == {"samples"} and result["samples"].shape == (2, SIZES[kind].out_dim, 5, 4, 6)
    assert result["samples"].isfinite().all()
    assert wan_vae.decode(result["samples"]).shape == (2, 17, HEIGHT, WIDTH, 3)
