"""The training code: drawn clips, losses, and exact resume of a stopped run."""

import contextlib
import json
from dataclasses import replace
from itertools import product
from random import Random

import pytest
import torch
from safetensors import safe_open
from stillmotion.nodes.causal_wan.schedule import make_steps
from stillmotion.nodes.common.demo import DYNAMICRAFTER as DEMO
from stillmotion.nodes.training import objectives
from stillmotion.nodes.training.config import TrainConfig
from stillmotion.nodes.training.data import shapes as data
from stillmotion.nodes.training.loop import fit
from stillmotion.nodes.training.recipes import dynamicrafter_64 as demo
from stillmotion.nodes.training.recipes import laws


def test_one_combination_in_five_is_held_out_and_never_drawn():
    combinations = list(product(data.SHAPES, data.COLOURS, data.DIRECTIONS))
    held_out = {c for c in combinations if data.is_held_out(*c)}
    assert 0.18 < len(held_out) / len(combinations) < 0.22
    for position, names in enumerate((data.SHAPES, data.COLOURS, data.DIRECTIONS)):
        assert {c[position] for c in held_out} == set(names)  # each shape, colour and direction is in both splits
    rng = Random(0)
    drawn = {(c.shape, c.colour, c.direction) for c in (data.random_clip(rng) for _ in range(3000))}
    assert drawn == set(combinations) - held_out
    unseen = [data.random_clip(rng, held_out=True) for _ in range(50)]
    assert all((c.shape, c.colour, c.direction) in held_out for c in unseen)


def test_captions_of_training_leave_one_form_and_the_held_out_combinations_away():
    captions = demo.all_captions()
    assert captions[0] == "" and len(captions) == len(set(captions))
    assert not any("slides" in caption for caption in captions)
    clip = data.random_clip(Random(1), held_out=True)
    assert not {clip.caption(form) for form in range(len(data.CAPTION_FORMS))} & set(captions)


@pytest.mark.parametrize("direction", list(data.DIRECTIONS))
def test_shapes_stay_inside_whichever_way_they_go(direction):
    rng = Random(2)
    for _ in range(10):
        clip = replace(data.random_clip(rng), direction=direction)
        frames = data.draw_clip(clip, data.MAX_FRAMES)
        ground = torch.tensor(data.BACKGROUNDS[clip.background], dtype=torch.uint8)
        edges = torch.cat((frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]))
        assert (edges == ground).all()


def test_a_returning_clip_ends_as_it_began():
    frames = data.draw_clip(data.random_clip(Random(3), returns=True))
    assert torch.equal(frames[0], frames[-1]) and not torch.equal(frames[0], frames[7])


def test_timesteps_of_the_demos_lie_mostly_at_the_noisy_end_and_leave_none_out():
    counts = torch.bincount(laws.noisy_timesteps(50000, torch.Generator().manual_seed(0)), minlength=1000)
    assert len(counts) == 1000 and counts.min() > 0
    assert counts[800:].sum() > 2 * counts[:800].sum() / 4 and counts.argmax() == 999


@pytest.mark.parametrize("law, middle", [("uniform", 0.5), ("logit_normal", 0.728)])
def test_timesteps_of_the_trainer_follow_their_law(law, middle):
    t = objectives.draw_timesteps(50000, torch.Generator().manual_seed(0), law)
    assert t.min() >= 0 and t.max() <= 999
    assert t.float().mean().item() == pytest.approx(499.5, abs=5)
    assert ((t >= 250) & (t < 750)).float().mean().item() == pytest.approx(middle, abs=0.01)
    assert TrainConfig().timesteps == "uniform"


def test_noise_levels_are_shifted_as_the_sampler_shifts_its_steps():
    sigma = objectives.shift_sigmas(torch.tensor([0.25, 0.5, 0.75, 1.0]), 5.0)
    assert sigma.tolist() == pytest.approx([s.sigma for s in reversed(make_steps((1000, 750, 500, 250), 5.0, True))])
    assert torch.equal(objectives.shift_sigmas(sigma, 1.0), sigma)


def test_a_perfect_v_prediction_has_no_loss():
    z = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alphas, scale = torch.linspace(1, 0, 1000), torch.linspace(1, 0.7, 1000)

    def oracle(x, t, text, image, fs):
        a, x0 = alphas[t].view(-1, 1, 1, 1, 1), z * scale[t].view(-1, 1, 1, 1, 1)
        noise = (x[:, :4] - a.sqrt() * x0) / (1 - a).sqrt()
        return (a.sqrt() * noise - (1 - a).sqrt() * x0).nan_to_num()

    def loss(net, **changes):
        return objectives.video_v_loss(net, z, objectives.concat_condition(z, torch.tensor([True, False])), None, None,
                                       None, alphas, scale, torch.Generator().manual_seed(4), **changes).item()

    assert loss(oracle) < 1e-6
    nothing = loss(lambda x, *_: torch.zeros_like(x[:, :4]))
    assert loss(lambda x, *_: torch.zeros_like(x[:, :4]), emphasis=5.0) > 2 * nothing > 0.1


def test_condition_frames_of_both_layouts():
    z = torch.arange(2 * 3.0).view(2, 1, 3, 1, 1)
    found = objectives.concat_condition(z, torch.tensor([True, False])).flatten(1).tolist()
    assert found == [[0, 0, 2], [3, 3, 3]]


def failing(loss_of, after):
    calls = []

    def loss(number, generator):
        calls.append(1)
        if len(calls) > after:
            raise InterruptedError
        return loss_of(number, generator)

    return loss


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    def run(name, *stops):
        for steps in stops:
            torch.manual_seed(0)
            net = torch.nn.Linear(3, 1)

            def loss_of(number, generator, net=net):
                x = torch.randn(8, 3, generator=generator)
                return (net(x) - x.sum(1, keepdim=True)).square().mean()

            with contextlib.suppress(InterruptedError):
                averaged = fit(net, loss_of if steps == 40 else failing(loss_of, steps), steps=40, lr=1e-2,
                               checkpoint=tmp_path / f"{name}.pt", ema_decay=0.9, save_every=10)
        return averaged.weight

    assert torch.equal(run("whole", 40), run("stopped", 25, 40))
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 25, 30, 40]  # progress before the stop was kept


def poisoned(net, at, times, weights=False):
    """A loss that is NaN (or gives such gradients) the first `times` times that batch `at` is drawn."""
    left = [times]

    def loss_of(number, generator):
        x = torch.randn(8, 3, generator=generator)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        if number == at and left[0]:
            left[0] -= 1
            return loss + (0 * net.weight).square().sum().sqrt() if weights else loss * torch.nan
        return loss

    return loss_of


def fit_poisoned(path, at=25, times=1, stop=None, **settings):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)

    def on_step(step, losses, seconds, rate):
        if step == stop and not stopped:
            stopped.append(step)
            raise InterruptedError

    stopped = []
    return fit(net, poisoned(net, at, times, **settings), steps=40, lr=1e-2, checkpoint=path, ema_decay=0.9,
               save_every=10, on_step=on_step).weight


@pytest.mark.parametrize("weights", [False, True])
def test_nan_is_never_saved_and_the_run_goes_on_at_a_tenth_of_the_rate(tmp_path, caplog, weights):
    averaged = fit_poisoned(tmp_path / "a.pt", weights=weights)
    assert averaged.isfinite().all() and "Back to step 20, and on at a tenth of the learning rate" in caplog.text
    steps = [json.loads(line)["step"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40]
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state["cuts"] == 1 and not torch.equal(averaged, fit_poisoned(tmp_path / "b.pt", times=0))


def test_a_run_at_a_lower_rate_goes_on_bit_for_bit(tmp_path):
    whole = fit_poisoned(tmp_path / "whole.pt")
    with pytest.raises(InterruptedError):
        fit_poisoned(tmp_path / "stopped.pt", stop=33)
    assert torch.equal(fit_poisoned(tmp_path / "stopped.pt", times=0), whole)


def test_a_run_that_stays_nan_ends_with_the_last_good_state(tmp_path):
    with pytest.raises(FloatingPointError, match="After step 30 .* give a lower learning rate"):
        fit_poisoned(tmp_path / "a.pt", times=100)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state["step"] == 20 and all(value.isfinite().all() for value in state["net"].values())


def test_a_stop_between_nan_and_the_next_look_saves_nothing(tmp_path):
    with pytest.raises(InterruptedError):
        fit_poisoned(tmp_path / "a.pt", stop=27)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 20


def test_the_shipped_demo_has_the_layout_of_this_code():
    with safe_open(DEMO, "pt") as file:
        shipped = {key.removeprefix("model.diffusion_model."): list(file.get_slice(key).get_shape())
                   for key in file.keys() if key.startswith(("model.diffusion_model.", "image_proj_model."))}
    assert shipped == {key: list(value.shape) for key, value in demo.demo_unet().state_dict().items()}
