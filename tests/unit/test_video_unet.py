"""The video U-Net as a network: sizes of every layer, receptive field, loss, subclasses."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.ddim.schedule import NUM_TIMESTEPS, make_alphas_cumprod, make_betas
from stillmotion.nodes.training import objectives
from stillmotion.nodes.training.families import video_unet as family
from stillmotion.nodes.training.recipes import video_unet as video_unet_demo
from stillmotion.nodes.training.recipes import video_unet_96
from stillmotion.nodes.training.recipes.laws import noisy_timesteps
from stillmotion.nodes.video_unet.attention import Attention
from stillmotion.nodes.video_unet.unet import Block, ResBlock, new_network
from torch import nn
from video_unet_stub import LoudnessUNet, make_config, make_params, random_network

T, H, W, L = 5, 8, 12, 7


def clip_of(params, batch=2, frames=T, height=H, width=W, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x_BCTHW = torch.randn(batch, params.in_channels, frames, height, width, generator=generator)
    text_BLC = torch.randn(batch, L, params.context_dim, generator=generator)
    return x_BCTHW.to(dtype), torch.tensor([3.0, 700.0])[:batch], text_BLC.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_gives_the_shape_and_type_that_belong_to_it(dtype):
    params = make_params(num_res_blocks=2, spatial_attention=(0, 1))
    net, seen = random_network(params).to(dtype), {}
    for name, module in net.named_modules():
        if isinstance(module, (ResBlock, Attention, Block)) or name in ("input", "output", "time_embed"):
            module.register_forward_hook(
                lambda module, given, out, name=name: seen.update({name: (tuple(out.shape), out.dtype)}))
    net(*clip_of(params, dtype=dtype))
    fine, coarse = (2 * T, 16, H, W), (2 * T, 32, H // 2, W // 2)
    expected = {"input": fine, "output": (2 * T, 4, H, W), "time_embed": (2, 64)}
    for place, size in [("down.0.blocks.0", fine), ("down.0.blocks.1", fine), ("down.1.blocks.0", coarse),
                        ("down.1.blocks.1", coarse), ("middle.0", coarse), ("middle.1", coarse),
                        ("up.0.blocks.0", coarse), ("up.0.blocks.1", coarse), ("up.1.blocks.0", fine),
                        ("up.1.blocks.1", fine)]:
        expected |= {place: size, **{f"{place}.{part}": size for part in ("res", "spatial", "text", "temporal")}}
    assert seen == {name: (size, dtype) for name, size in expected.items()}


def test_the_demos_network_has_the_size_that_its_card_says():
    net = new_network(video_unet_96.PARAMS, seed=30)
    assert sum(value.numel() for value in net.parameters()) == 1_764_804
    assert {value.dtype for value in net.parameters()} == {torch.float32}


def test_a_state_dict_goes_round():
    params = make_params()
    net, other = random_network(params, seed=1), random_network(params, seed=2)
    clip = clip_of(params)
    with torch.no_grad():
        assert not torch.equal(net(*clip), other(*clip))
        other.load_state_dict(net.state_dict())
        assert torch.equal(net(*clip), other(*clip))


def test_a_new_network_predicts_nothing_and_every_weight_has_a_gradient_after_two_steps():
    params = make_params(additional_condition_dim=3)
    net, clip = new_network(params, seed=0), clip_of(params)
    assert not net(*clip).any()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):  # zero-initialized layers become nonzero one after the other
        optimizer.zero_grad()
        (net(*clip, additional_BD=torch.ones(2, 3)) - 1).square().mean().backward()
        optimizer.step()
    assert [name for name, value in net.named_parameters() if not value.grad.any()] == []


@settings(max_examples=8, deadline=None)
@given(frames=st.integers(1, 7), height=st.integers(2, 9), width=st.integers(2, 9))
def test_any_size_and_number_of_frames_is_taken(frames, height, width):
    params = make_params(channels=3, channel_mult=(1, 2, 2), spatial_attention=())
    net = new_network(params, seed=0)
    assert net(*clip_of(params, 1, frames, height, width)).shape == (1, 3, frames, height, width)


def changed_by(net, params, change):
    """Mask [T, H, W] of where the prediction depends on an input (x_BCTHW, t_B, text_BLC)."""
    before = clip_of(params, 1)
    after = [value.clone() for value in before]
    change(*after)
    with torch.no_grad():
        return (net(*before) - net(*after)).abs().amax((0, 1)) > 0


def test_text_given_frames_mask_and_time_all_reach_every_place_of_every_frame():
    params = make_params()
    net = random_network(params)
    assert changed_by(net, params, lambda x, t, text: text[:, 2].add_(1)).all()
    assert changed_by(net, params, lambda x, t, text: t.add_(100)).all()
    for channel in (0, params.channels, 2 * params.channels):  # noisy clip, given frames and mask of the first frame
        assert changed_by(net, params, lambda x, t, text, c=channel: x[:, c, 0].add_(1)).all()


def test_samples_of_a_batch_do_not_see_each_other():
    params = make_params()
    net, (x, t, text) = random_network(params), clip_of(params)
    with torch.no_grad():
        alone = torch.cat([net(x[i:i + 1], t[i:i + 1], text[i:i + 1]) for i in range(2)])
        assert (net(x, t, text) - alone).abs().max() < 1e-5


def test_frames_are_told_apart_by_their_position():
    """A clip of identical frames: without positions only the frames at the ends would differ."""
    params = make_params(num_res_blocks=1)
    net = random_network(params)
    x, t, text = clip_of(params, 1, frames=16)
    with torch.no_grad():
        out = net(x[:, :, :1].expand(-1, -1, 16, -1, -1).contiguous(), t, text)
    inner = out[0, :, 6:10]
    assert (inner[:, 1:] - inner[:, :-1]).abs().amax((0, 2, 3)).min() > 1e-4


def test_an_additional_condition_steers_the_network_and_its_width_is_checked():
    params = make_params(additional_condition_dim=3)
    net, clip = random_network(params), clip_of(params)
    with torch.no_grad():
        assert not torch.equal(net(*clip), net(*clip, additional_BD=torch.ones(2, 3)))
        with pytest.raises(ValueError, match="5 wide, but this network takes 3"):
            net(*clip, additional_BD=torch.ones(2, 5))
    with pytest.raises(ValueError, match="takes none"):
        random_network(make_params())(*clip, additional_BD=torch.ones(2, 3))


def test_a_subclass_of_a_few_lines_takes_another_kind_of_condition():
    params = make_params()
    torch.manual_seed(0)
    net, clip = LoudnessUNet(params, nn, torch_attention), clip_of(params)
    with torch.no_grad():
        quiet, loud = (net(*clip, additional_BD=level * torch.ones(2, 9)) for level in (0.0, 3.0))
    assert not torch.equal(quiet, loud)


@pytest.mark.parametrize("changes, words", [({"model_channels": 24}, "multiple of 16"),
                                            ({"head_channels": 5}, "head_channels"),
                                            ({"spatial_attention": (2,)}, "levels 0 to 1")])
def test_sizes_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_params(**changes)


# ---- schedule and loss -------------------------------------------------------------------------------------

def test_the_cosine_schedule_is_the_papers():
    config = make_config()
    alphas = make_alphas_cumprod(config.diffusion)
    t = (torch.arange(NUM_TIMESTEPS, dtype=torch.float64) + 1) / NUM_TIMESTEPS

    def f(x):
        return torch.cos((x + 0.008) / 1.008 * torch.pi / 2) ** 2
    expected = f(t) / f(torch.zeros(1, dtype=torch.float64))
    assert (alphas[:-1] - expected[:-1]).abs().max() < 1e-12
    assert 1e-9 < alphas[-1] < 1e-8  # the cap keeps it above 0
    assert make_betas(config.diffusion).max() == 0.999
    linear = make_alphas_cumprod(make_config(schedule="linear").diffusion)
    assert linear[-1] == pytest.approx(0.00466, abs=1e-5)
    with pytest.raises(ValueError, match="linear, cosine"):
        replace(config.diffusion, shape="square")


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_perfect_prediction_has_no_loss_and_sees_given_frames_only(prediction):
    alphas = make_alphas_cumprod(make_config().diffusion).float()
    z = torch.randn(3, 4, T, 4, 4, generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[0.0] * T, [1, 1, 0, 0, 0], [1, 0, 0, 0, 1]])

    class Oracle(nn.Module):
        def forward(self, x, t, text, additional):
            a = alphas[t].view(-1, 1, 1, 1, 1)
            noise = (x[:, :4] - a.sqrt() * z) / (1 - a).sqrt()
            shown = mask[:, None, :, None, None].expand(-1, 1, -1, 4, 4)
            assert torch.equal(x[:, 4:8], z * shown) and torch.equal(x[:, 8:], shown)
            return noise if prediction == "eps" else a.sqrt() * noise - (1 - a).sqrt() * z

    def loss(net):
        return objectives.video_unet_loss(net, z, mask, None, alphas, prediction, torch.Generator().manual_seed(6), 5)
    assert loss(Oracle()) < 1e-6
    assert loss(lambda x, *_: torch.zeros_like(z)) > 0.3


def test_the_loss_takes_known_predictions_only():
    with pytest.raises(ValueError, match="eps or v"):
        objectives.video_unet_loss(None, torch.zeros(1, 1, 1, 1, 1), None, None, None, "x0", torch.Generator())


def test_tasks_of_the_demo_come_in_their_shares():
    masks = video_unet_demo.draw_masks(torch.zeros(8000, dtype=torch.bool), torch.Generator().manual_seed(0))
    ends = masks[:, -1] == 1
    count = masks[~ends].sum(1)
    assert ends.float().mean() == pytest.approx(0.1, abs=0.02)
    for chosen, share in ((count == 0, 0.35), (count == 1, 0.1), (count > 1, 0.45)):
        assert chosen.sum() / 8000 == pytest.approx(share, abs=0.02)
    assert (masks[~ends].diff(dim=1) <= 0).all() and count.max() == 8  # the first frames, without gaps
    both = video_unet_demo.draw_masks(torch.ones(5, dtype=torch.bool), torch.Generator())
    assert both.tolist() == [[1.0] + [0.0] * 14 + [1.0]] * 5


def test_tasks_of_the_trainer_come_in_their_shares():
    masks = family.draw_masks(torch.zeros(8000, dtype=torch.bool), 16, torch.Generator().manual_seed(0))
    count = masks.sum(1)
    ends = (masks[:, -1] == 1)
    assert (count == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert ends.float().mean() == pytest.approx(0.05, abs=0.01)
    past = masks[~ends & (count > 0)]
    assert (past.diff(dim=1) <= 0).all() and past.sum(1).max() == 8  # the first frames, without gaps
    both = family.draw_masks(torch.ones(5, dtype=torch.bool), 16, torch.Generator())
    assert both.tolist() == [[1.0] + [0.0] * 14 + [1.0]] * 5


def test_one_clip_is_learned_by_heart():
    """The loss would not decrease if the network learned nothing."""
    params = make_params()
    net, generator = new_network(params, seed=3), torch.Generator()
    z = torch.randn(1, 4, 2, 4, 4, generator=generator.manual_seed(1))
    text, mask = torch.randn(4, L, params.context_dim, generator=generator), torch.zeros(4, 2)
    alphas = make_alphas_cumprod(make_config().diffusion).float()
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=5e-3), []
    for step in range(30):
        loss = objectives.video_unet_loss(net, z.expand(4, -1, -1, -1, -1), mask, text, alphas, "v",
                                          generator.manual_seed(step), timesteps=noisy_timesteps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
