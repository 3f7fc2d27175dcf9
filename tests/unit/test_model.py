"""DynamiCrafter as a native MODEL: context cached over a run, any length and size, LoRA, bad conditioning, saving."""

import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.cli_args import args
from core_calls import saved_by_core
from dynamicrafter_stub import conditioning, difference, draw, make, sample, weights
from stillmotion.nodes.dynamicrafter import base
from stillmotion.nodes.dynamicrafter.unet import VideoUNet, frame_tokens


def test_context_is_projected_once_a_run(monkeypatch):
    model, calls = make(), []
    project = VideoUNet.project_context
    monkeypatch.setattr(VideoUNet, "project_context", lambda *args: calls.append(1) or project(*args))
    kept = sample(model, conditioning(), steps=4)
    assert len(calls) == 1
    without = model.clone()
    without.remove_wrappers_with_key(base.WrappersMP.OUTER_SAMPLE, "stillmotion_context")
    assert difference(sample(without, conditioning(), steps=4), kept) < 1e-6
    assert len(calls) == 5


def test_the_next_run_projects_its_own_context():
    model = make()
    first = sample(model, conditioning())
    other = conditioning()
    other[0][0][0] = other[0][0][0] + 1
    assert difference(sample(model, other), first) > 1e-3
    assert torch.equal(sample(model, conditioning()), first)


def test_three_way_guidance_at_equal_strengths_is_plain_guidance():
    model = make()
    plain = sample(model, conditioning(), guidance_rescale=0.0)
    three = sample(model, conditioning(), guidance_rescale=0.0, image_cfg=4.0)
    assert difference(three, plain) < 1e-5
    assert difference(sample(model, conditioning(), guidance_rescale=0.0, image_cfg=1.5), plain) > 1e-3


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 16])
def test_any_number_of_frames(frames):
    assert sample(make(), conditioning(frames=frames)).shape == (1, 4, frames, 8, 8)


def test_sides_that_the_network_cannot_halve():
    result = sample(make(), conditioning(height=7, width=5))
    assert result.shape == (1, 4, 4, 7, 5) and result.isfinite().all()


def test_clips_of_a_batch_are_independent():
    model, one = make(), conditioning()
    many = conditioning(clips=2)
    many[0][0][1]["concat_latent_image"][:1] = one[0][0][1]["concat_latent_image"]
    assert difference(sample(model, many, eta=0.0)[:1], sample(model, one, eta=0.0)) < 1e-5


def test_long_prompts_are_read_to_their_end():
    model, conds = make(), conditioning(words=154)
    first = sample(model, conds)
    conds[0][0][0] = conds[0][0][0].clone()
    conds[0][0][0][:, 150] += 3
    assert difference(sample(model, conds), first) > 1e-4


def test_frame_tokens_keep_the_ends_and_the_order():
    tokens = torch.arange(8.0).view(1, 8, 1)  # four frames with two tokens each
    assert torch.equal(frame_tokens(tokens, 4, 2), tokens.view(4, 2, 1))
    longer = frame_tokens(tokens, 7, 2)
    assert longer.shape == (7, 2, 1)
    assert longer[:, 0, 0].tolist() == pytest.approx([0, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("layer", ["input_blocks.1.1.transformer_blocks.0.attn2.to_k_ip",
                                   "middle_block.0.temopral_conv.conv4.3", "image_proj_model.proj_in"])
def test_lora_through_cores_loader_equals_merged_weights(layer):
    given = weights()
    weight = given[f"{layer}.weight"]
    up, down = draw(weight.shape[0], 2, seed=6), draw(2, weight[0].numel(), seed=7)
    lora = {f"diffusion_model.{layer}.lora_up.weight": up.view(weight.shape[0], 2, *[1] * (weight.ndim - 2)),
            f"diffusion_model.{layer}.lora_down.weight": down.view(2, *weight.shape[1:])}
    patched, _ = comfy.sd.load_lora_for_models(make(), None, lora, 0.7, 0)
    merged = make({**weights(), f"{layer}.weight": weight + 0.7 * (up @ down).view(weight.shape)})
    plain, result = sample(make(), conditioning()), sample(patched, conditioning())
    assert difference(result, sample(merged, conditioning())) < 1e-4
    assert difference(result, plain) > 1e-3


@pytest.mark.parametrize("change, words", [
    (lambda p, n: n[0][1].pop("image_tokens"), "image"),
    (lambda p, n: p[0][1].pop("concat_latent_image"), "image"),
    (lambda p, n: p[0].__setitem__(0, torch.zeros(1, 77, 20)), "text encoder gives tokens 20 wide"),
    (lambda p, n: n[0][1].update(image_tokens=torch.zeros(1, 5, 30)), "vision tower gives tokens 30 wide"),
])
def test_conditioning_that_does_not_fit(change, words):
    positive, negative = conditioning()
    change(positive, negative)
    latent = {"samples": torch.zeros(1, 4, 4, 8, 8)}
    guider = comfy.samplers.CFGGuider(make())
    guider.set_conds(positive, negative)
    guider.set_cfg(4.0)
    sampler = comfy.samplers.sampler_object("euler")
    with pytest.raises(ValueError, match=words):
        guider.sample(latent["samples"], latent["samples"], sampler, torch.tensor([5.0, 1.0, 0.0]))


@pytest.mark.parametrize("shape", [(1, 4, 5, 8, 8), (1, 4, 4, 8, 10), (1, 4, 1, 8, 8)])
def test_latent_of_another_size(shape):
    guider = comfy.samplers.CFGGuider(make())
    guider.set_conds(*conditioning())
    with pytest.raises(ValueError, match="conditioning was made for 4 x 4 x 8 x 8"):
        guider.sample(torch.zeros(shape), torch.zeros(shape), comfy.samplers.sampler_object("euler"),
                      torch.tensor([5.0, 1.0, 0.0]))


def test_saved_state_has_the_published_layout(tmp_path):
    saved = saved_by_core(make(), tmp_path / "saved.safetensors")
    assert torch.equal(saved["image_proj_model.latents"], weights()["image_proj_model.latents"])
    assert "model.diffusion_model.init_attn.0.proj_in.weight" in saved
    assert saved["scale_arr"].shape == (1400,) and saved["scale_arr"][-1] == pytest.approx(0.7)


def test_channels_last_reaches_the_weights_that_it_can(monkeypatch):
    """ComfyUI's --force-channels-last; torch rejects it for a whole network with 3-D convolutions."""
    monkeypatch.setattr(args, "force_channels_last", True)
    network = make().model.diffusion_model
    for dimensions, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        weights = [weight for weight in network.parameters() if weight.ndim == dimensions and weight.shape[2] > 1]
        assert weights and all(weight.is_contiguous(memory_format=layout) for weight in weights)
