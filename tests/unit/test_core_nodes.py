"""Core's U-Net nodes on DynamiCrafter and the video U-Net: they act at the same places as in core's own network, or are
rejected with a message; context windows slice every condition as for a clip of just their frames."""

import inspect

import comfy.lora
import dynamicrafter_stub as crafter
import pytest
import torch
import video_unet_stub as plain_unet
from comfy_extras import (
    nodes_context_windows,
    nodes_easycache,
    nodes_freelunch,
    nodes_hypertile,
    nodes_lumina2,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_pag,
    nodes_rope,
    nodes_sag,
    nodes_tomesd,
    nodes_video_model,
)
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.ddim.sampler import DDIMSettings, sample_latent
from stillmotion.nodes.ddim.step import Clip
from stillmotion.nodes.dynamicrafter.unet import VideoUNet as CrafterUNet
from stillmotion.nodes.video_unet.conditioning import clip_conditions

FAMILIES = ("dynamicrafter", "video_unet")


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def make(family, **params):
    if family == "dynamicrafter":
        return crafter.make()
    sizes = {"spatial_attention": (0, 1)} | params
    return plain_unet.make_model(params=plain_unet.make_params(**sizes))


def sample(model, frames=6, clips=1, settings=None, start_noise=None, conds=None):
    """The latent [B, 4, T, 8, 8] after a few steps."""
    family = "dynamicrafter" if hasattr(model.model, "params") else "video_unet"
    if conds is None and family == "dynamicrafter":
        conds = crafter.conditioning(frames, clips=clips)
    elif conds is None:
        values = clip_conditions(model.model.video_unet, None, None, "none", 64, 64, frames, clips)[0]
        conds = [[[crafter.draw(1, 77, 32, seed=seed), values]] for seed in (1, 2)]
    settings = settings or DDIMSettings(2, 3.0, 0.0, "auto", 0.0, 1.0, 0.0, Clip("off", 3.0, False), 0, 1000, "fixed")
    latent = {"samples": torch.zeros(clips, 4, frames, 8, 8)}
    return sample_latent(model, *conds, latent, 3, settings, start_noise)[0]["samples"]


def put(node, model, *values):
    """The MODEL returned by a core node; in 0.3.75 some use the older node API."""
    if hasattr(node, "execute"):
        answer = node.execute(model, *values)
        return (answer if isinstance(answer, tuple) else answer.result)[0]
    return getattr(node(), node.FUNCTION)(model, *values)[0]


def windows(model, length, overlap, dim=2, schedule="standard_static", fuse="pyramid", **newer):
    node = nodes_context_windows.ContextWindowsManualNode
    known = inspect.signature(node.execute).parameters
    newer = {name: value for name, value in ({"freenoise": False} | newer).items() if name in known}
    return node.execute(model, length, overlap, schedule, 1, False, fuse, dim, **newer).result[0]


ACTING = {
    "FreeU": lambda m: put(nodes_freelunch.FreeU, m, 1.1, 1.2, 0.9, 0.2),
    "FreeU_V2": lambda m: put(nodes_freelunch.FreeU_V2, m, 1.3, 1.4, 0.9, 0.2),
    "HyperTile": lambda m: put(nodes_hypertile.HyperTile, m, 32, 2, 0, False),
    "TomePatchModel": lambda m: put(nodes_tomesd.TomePatchModel, m, 0.5),
    "downscale after the skip": lambda m: put(nodes_model_downscale.PatchModelAddDownscale, m, 2, 2.0, 0.0, 0.9, True,
                                              "bicubic", "bicubic"),
    "downscale before the first skip": lambda m: put(nodes_model_downscale.PatchModelAddDownscale, m, 1, 1.7, 0.0, 0.9,
                                                     False, "bilinear", "bislerp"),
    "PerturbedAttentionGuidance": lambda m: put(nodes_pag.PerturbedAttentionGuidance, m, 3.0),
    "RenormCFG": lambda m: put(nodes_lumina2.RenormCFG, m, 100.0, 1.0),
    "ContextWindowsManual": lambda m: windows(m, 4, 2),
}


@pytest.mark.parametrize("node", ACTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts(family, node):
    plain = sample(make(family))
    found = sample(ACTING[node](make(family)))
    assert found.shape == plain.shape and found.isfinite().all()
    assert crafter.difference(found, plain) > 2e-3


@pytest.mark.parametrize("node", ["FreeU", "HyperTile", "TomePatchModel", "downscale after the skip"])
def test_sides_that_the_network_pads(node):
    conds = crafter.conditioning(3, 9, 7)
    found = crafter.sample(ACTING[node](crafter.make()), conds, steps=2)
    assert found.shape == (1, 4, 3, 9, 7) and found.isfinite().all()
    assert crafter.difference(found, crafter.sample(crafter.make(), conds, steps=2)) > 1e-3


# ---- places --------------------------------------------------------------------------------------------------

def network(family):
    """(network, its arguments except the options) for one clip of 3 frames of 8 x 8."""
    torch.manual_seed(0)
    if family == "dynamicrafter":
        net = CrafterUNet(crafter.CONFIG.unet, torch.nn, torch_attention)
        net.load_state_dict(crafter.weights())
        given = crafter.draw(2, 16, 24), torch.tensor([5.0, 5.0])
        return net, (crafter.draw(2, 8, 3, 8, 8), torch.tensor([400.0] * 2), crafter.draw(2, 77, 16), *given)
    net = plain_unet.random_network(plain_unet.make_params(spatial_attention=(0, 1)))
    return net, (crafter.draw(2, 9, 3, 8, 8), torch.tensor([400.0] * 2), crafter.draw(2, 77, 32))


PLACES = ("input_block_patch", "input_block_patch_after_skip", "output_block_patch", "attn1_patch",
          "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_are_called_at_cores_places_with_pictures(family):
    net, given = network(family)
    seen = {place: [] for place in PLACES}

    def watch(place, several):
        def function(*told):
            *tensors, options = told
            seen[place].append((options["block"], [tuple(tensor.shape) for tensor in tensors], options))
            return tuple(tensors) if several else tensors[0]
        return function

    options = {"patches": {place: [watch(place, place in ("output_block_patch", "attn1_patch", "attn2_patch"))]
                           for place in PLACES}}
    found = net(*given, transformer_options=options)
    assert crafter.difference(found, net(*given)) < 1e-5  # repeating the text for every frame gives the same attention
    assert list(options) == ["patches"]  # extra entries go into a copy

    inputs, outputs = [("input", i) for i in range(4)], [("output", i) for i in range(len(seen["output_block_patch"]))]
    assert [block for block, *_ in seen["input_block_patch"]] == inputs
    assert [block for block, *_ in seen["input_block_patch_after_skip"]] == inputs
    assert [block for block, *_ in seen["output_block_patch"]] == outputs
    assert all(shape[0] == 6 for _, shapes, _ in seen["output_block_patch"] for shape in shapes)  # frames as batch
    for place in PLACES[3:]:
        assert seen[place], place
        for block, shapes, told in seen[place]:
            assert block in [*inputs, ("middle", 0), *outputs]
            frames, _, height, width = told["activations_shape"]
            assert shapes[0][:2] == (frames, height * width) == (6, height * width)
            assert told["original_shape"][-2:] == [8, 8] and told["n_heads"] * told["dim_head"] == shapes[0][2]
            assert "patches" not in told
    assert {shapes[1][:2] for _, shapes, _ in seen["attn2_patch"]} == {(6, 77)}
    assert [told["transformer_index"] for *_, told in seen["attn2_patch"]] == list(range(len(seen["attn2_patch"])))


@pytest.mark.parametrize("name, tokens", [("attn1", (6, 16)), ("attn2", (6, 77))])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_is_taken_over_by_its_block(family, name, tokens):
    net, given = network(family)
    plain, calls = net(*given), []

    def same(q, k, v, told):
        calls.append((q.shape, k.shape[:2], told["block"]))
        return torch_attention(q, k, v, told["n_heads"])

    for block in (("middle", 0), ("middle", 0, 0)):
        found = net(*given, transformer_options={"patches_replace": {name: {block: same}}})
        assert crafter.difference(found, plain) < 1e-5
    assert all(k == tokens and block == ("middle", 0) for _, k, block in calls)
    zero = net(*given, transformer_options={"patches_replace": {name: {("middle", 0): lambda q, k, v, told: 0 * q}}})
    assert crafter.difference(zero, plain) > 1e-4
    elsewhere = {"patches_replace": {name: {("middle", 1): lambda q, k, v, told: 0 * q}}}
    assert torch.equal(net(*given, transformer_options=elsewhere), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_sides_that_a_function_has_shrunk_to_what_cannot_be_halved(family):
    net, given = network(family)

    def shrink(h, told):
        return h[..., :4, :5] if told["block"] == ("input", 1) else h

    def widen(h, skip, told):  # like PatchModelAddDownscale, based on the height alone
        return (h if h.shape[2] == skip.shape[2] else torch.nn.functional.interpolate(h, size=skip.shape[2:])), skip

    found = net(*given, transformer_options={"patches": {"input_block_patch": [shrink], "output_block_patch": [widen]}})
    assert found.shape == (2, 4, 3, 8, 8) and found.isfinite().all()


def test_core_reads_no_more_of_the_sizes_than_freeu_needs():
    for family in FAMILIES:
        model = make(family).model
        assert model.model_config.unet_config.keys() - {"params", "dtype"} == {"model_channels"}
        assert comfy.lora.model_lora_keys_unet(model, {})


# ---- rejected nodes ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("params, patch, clips, words", [
    ({}, lambda m: put(nodes_sag.SelfAttentionGuidance, m, 0.5, 2.0), 1, "Self-Attention Guidance .* Perturbed"),
    ({}, lambda m: put(nodes_video_model.VideoLinearCFGGuidance, m, 1.0), 1, "Video Linear .* set cfg in the sampler"),
    ({"channel_mult": (1, 3)}, ACTING["FreeU"], 1, "FreeU changes levels that are 32 or 64 .* this network has 16, 48"),
    ({"spatial_attention": (1,)}, ACTING["HyperTile"], 1, "HyperTile .* has none there"),
    ({"spatial_attention": (1,)}, ACTING["TomePatchModel"], 1, "TomePatchModel .* has none there"),
    ({"spatial_attention": (0,)}, ACTING["PerturbedAttentionGuidance"], 1, "Perturbed.* middle .* none there"),
    ({}, ACTING["RenormCFG"], 2, "RenormCFG takes one clip .* batch of 2"),
    ({}, lambda m: put(nodes_rope.ScaleROPE, m, 2.0, 0.0, 2.0, 0.0, 2.0, 0.0), 1, "ScaleROPE .* has none"),
    ({}, lambda m: windows(m, 4, 2, dim=0), 1, "are along dim 0, .* Set dim to 2"),
    ({}, lambda m: windows(m, 6, 2), 1, "6 frames long, but the clip has only 6"),
    ({}, lambda m: windows(m, 4, 2), 2, "context windows take one clip .* batch of 2")])
def test_what_cannot_act_is_refused(params, patch, clips, words):
    with pytest.raises(ValueError, match=words):
        sample(patch(make("video_unet", **params)), clips=clips)


def test_refused_on_dynamicrafter_too():
    with pytest.raises(ValueError, match="Self-Attention Guidance"):
        sample(put(nodes_sag.SelfAttentionGuidance, crafter.make(), 0.5, 2.0))


def test_three_way_guidance_refuses_nodes_for_two_predictions():
    model = put(nodes_model_advanced.RescaleCFG, crafter.make(), 0.7)
    with pytest.raises(ValueError, match="image_cfg is 2, .*RescaleCFG.* Set image_cfg to 0"):
        crafter.sample(model, crafter.conditioning(), image_cfg=2.0)


# ---- context windows -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_is_sampled_as_a_clip_of_its_own_frames(family):
    """16 frames, equal to the text width of DynamiCrafter's stub: no other axis may be sliced."""
    model, noise = make(family), crafter.draw(1, 4, 16, 8, 8, seed=9)
    if family == "dynamicrafter":
        conds = crafter.conditioning(16)
    else:
        given = {"concat_latent_image": crafter.draw(1, 4, 16, 8, 8), "concat_mask": (torch.arange(16) > 2).float()
                 .view(1, 1, 16, 1, 1)}
        conds = [[[crafter.draw(1, 77, 32, seed=seed), given]] for seed in (1, 2)]
    cut = windows(model, 6, 0, schedule="batched", fuse="flat", causal_window_fix=False)  # 6, 6 and 4 frames
    found = sample(cut, 16, start_noise=noise, conds=conds)
    for begin, end in ((0, 6), (6, 12), (12, 16)):
        part = [[[text, {name: value[:, :, begin:end] if name.startswith("concat") else value
                         for name, value in values.items()}]] for (text, values), in conds]
        alone = sample(model, end - begin, start_noise=noise[:, :, begin:end], conds=part)
        assert crafter.difference(found[:, :, begin:end], alone) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_with_a_frame_before_them(family):
    """As of 0.24 core prepends one frame to all windows but the first, so that lengths differ."""
    found = sample(windows(make(family), 4, 2), 10)
    assert found.isfinite().all() and found.shape[2] == 10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("node", [nodes_easycache.EasyCacheNode, nodes_easycache.LazyCacheNode])
def test_a_cache_of_steps_leaves_evaluations_out(node, family):
    model, calls = make(family), []
    network = model.model.diffusion_model
    first = network.input if family == "video_unet" else network.input_blocks[0][0]
    first.register_forward_hook(lambda *_: calls.append(1))
    settings = DDIMSettings(6, 3.0, 0.0, "auto", 0.0, 1.0, 0.0, Clip("off", 3.0, False), 0, 1000, "fixed")
    plain = sample(model, settings=settings)
    assert len(calls) == 6
    found = sample(put(node, model, 3.0, 0.0, 1.0, False), settings=settings)
    assert 6 + 2 <= len(calls) < 6 + 6
    assert found.isfinite().all() and crafter.difference(found, plain) > 1e-6
    assert torch.equal(sample(model, settings=settings), plain)
