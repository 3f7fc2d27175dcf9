"""Self-rollout: rollouts, losses and conditions of the three networks, against the sampler and numbers by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stillmotion.nodes.causal_wan.attention import WanBlock
from stillmotion.nodes.causal_wan.blocks import BlockLoop
from stillmotion.nodes.causal_wan.cache import KVCache
from stillmotion.nodes.causal_wan.model import CausalWan, WanParams
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.training.families.registry import checkpoint_blocks
from stillmotion.nodes.training.self_rollout import matching
from stillmotion.nodes.training.self_rollout.conditions import Conditions
from stillmotion.nodes.training.self_rollout.method import SelfRollout, Stream
from stillmotion.nodes.training.self_rollout.rollout import Rollout, RolloutCache
from stillmotion.nodes.training.self_rollout.settings import SelfRolloutSettings
from torch import nn

T2V = WanParams(in_dim=4, out_dim=4, dim=16, ffn_dim=16, num_heads=2, num_layers=2, text_dim=6, freq_dim=8, i2v=False,
                clip_dim=0)
I2V = replace(T2V, in_dim=12, i2v=True, clip_dim=5)
SMALL = SelfRolloutSettings(rollout_steps=[1000, 500], gradient_frames=6)


def net(params, seed):
    torch.manual_seed(seed)
    made = CausalWan(params, nn, torch_attention).double()
    for block in made.blocks:
        nn.init.normal_(block.modulation)  # an untrained network hardly attends to other frames
    return made


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditions(params, batch=2, frames=6, prompts=1, first=False):
    image = {"image_BNW": random(batch, 3, 5), "y_BYFHW": random(batch, 8, frames, 4, 4, seed=1)} if params.i2v else {}
    return Conditions(**{"image_BNW": None, "y_BYFHW": None, **image}, negative_BND=random(batch, 3, 6, seed=2),
                      texts=tuple(random(batch, 3, 6, seed=3 + i) for i in range(prompts)),
                      first_BC1HW=random(batch, 4, 1, 4, 4, seed=9) if first else None)


def method(params, settings=SMALL, block=2):
    return SelfRollout(student=net(params, 1), real=net(params, 2), fake=net(params, 3), settings=settings, block=block)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


# ---- rollouts

def sampled(made, known, frames, exit_step, switch=0):
    """What the sampler makes with the steps up to the exit step, and the same noise."""
    plan, draw = made.plan(frames, switch), generator()
    known = known.lengthened(frames)
    plan = replace(plan, steps=plan.steps[:exit_step + 1], first_steps=plan.steps[:exit_step + 1])
    cache = KVCache(plan.layout(made.student.params, 4, 4), len(known.negative_BND), torch.float64, "cpu")
    loop = BlockLoop(plan=plan, caches=[cache], y_BYFHW=known.y_BYFHW, evaluate=made.student, on_step=lambda *_: None,
                     project=lambda number: [made.student.project_context(known.texts[number], known.image_BNW)],
                     noise=lambda start, count, step: torch.randn(2, 4, count, 4, 4, generator=draw).double())
    with torch.no_grad():
        return torch.cat([block.latent_BCFHW for block in loop.run(None, known.first_BC1HW, None)], dim=2)


@pytest.mark.parametrize("params", [T2V, I2V], ids=["t2v", "i2v"])
@pytest.mark.parametrize("exit_step", [0, 1])
def test_a_rollout_makes_what_the_sampler_makes(params, exit_step):
    made, known = method(params), conditions(params, first=not params.i2v)
    piece = made.roll_out(known, (2, 4, 6, 4, 4), exit_step, generator(), learn=True)
    assert torch.allclose(piece.x0_BCFHW, sampled(made, known, 6, exit_step), atol=1e-5)
    assert piece.lead == (0 if params.i2v else 1) and piece.blocks == (2, 2, 2)


@pytest.mark.parametrize("endless", [False, True])
def test_a_stream_makes_what_the_sampler_makes_with_its_window_and_change_of_prompt(endless):
    settings = replace(SMALL, stream_frames=15, stream_new=4, stream_switch_first=1, rollout_window=6, rollout_sink=2,
                       rollout_endless=endless)
    made, known = method(I2V, settings), conditions(I2V, prompts=2)
    stream, draws = Stream(made, lambda: (known, (2, 4, 4, 4))), generator()
    state = draws.get_state()
    pieces = [stream.next(1, draws, learn=True) for _ in range(3)]
    assert stream.rollout.plan.frames == 14 and stream.switch in (6, 10)
    # the switch is drawn before the noise
    draws.set_state(state)
    torch.randint(0, 2, (), generator=draws)
    new = [pieces[0].x0_BCFHW, *(piece.x0_BCFHW[:, :, 2:] for piece in pieces[1:])]
    whole = torch.cat(new, dim=2)
    by_sampler = sampled_with(draws, made, known, 14, stream.switch)
    assert torch.allclose(whole, by_sampler, atol=1e-5)
    assert [piece.lead for piece in pieces] == [0, 2, 2]
    assert torch.equal(pieces[1].x0_BCFHW[:, :, :2], whole[:, :, 4:6])
    prompts = [next(i for i, text in enumerate(known.texts) if text is piece.conditions.texts[0]) for piece in pieces]
    assert prompts == [0, int(stream.switch == 6), 1]
    y = pieces[2].conditions.y_BYFHW  # later pieces begin with a frame that was finished before
    assert (y[:, :4, 0] == 1).all() and torch.equal(y[:, 4:, 0], whole[:, :, 8])
    assert torch.equal(y[:, :, 1:], known.lengthened(14).y_BYFHW[:, :, 9:14])
    again = stream.next(1, generator(1), learn=False)  # a new video begins
    assert again.lead == 0 and stream.rollout.position == 6 and not again.x0_BCFHW.requires_grad


def sampled_with(draws, made, known, frames, switch):
    plan, known = made.plan(frames, switch), known.lengthened(frames)
    cache = KVCache(plan.layout(made.student.params, 4, 4), 2, torch.float64, "cpu")
    loop = BlockLoop(plan=plan, caches=[cache], y_BYFHW=known.y_BYFHW, evaluate=made.student, on_step=lambda *_: None,
                     project=lambda number: [made.student.project_context(known.texts[number], known.image_BNW)],
                     noise=lambda start, count, step: torch.randn(2, 4, count, 4, 4, generator=draws).double())
    with torch.no_grad():
        return torch.cat([block.latent_BCFHW for block in loop.run(None, None, None)], dim=2)


@pytest.mark.parametrize("window, sink", [(-1, 0), (4, 2)])
def test_gradients_are_the_same_with_gradient_checkpointing(window, sink):
    """Recomputing must see the cache as it was, though later blocks have exchanged its contents since."""
    gradients = []
    for recompute in (False, True):
        made = method(I2V, replace(SMALL, rollout_window=window, rollout_sink=sink, rollout_endless=sink > 0))
        if recompute:
            checkpoint_blocks(made.student, (WanBlock,))
        piece = made.roll_out(conditions(I2V), (2, 4, 6, 4, 4), 1, generator(), learn=True)
        made.student_loss(piece, generator(6)).backward()
        gradients.append({name: value.grad for name, value in made.student.named_parameters()})
    assert all(torch.allclose(value, gradients[1][name], rtol=1e-5, atol=1e-9) for name, value in gradients[0].items())
    assert all(value.abs().max() > 0 for value in gradients[0].values())


def test_only_the_last_frames_have_a_gradient_and_only_they_are_scored():
    made = method(I2V, replace(SMALL, gradient_frames=4))
    whole = method(I2V).roll_out(conditions(I2V), (2, 4, 6, 4, 4), 0, generator(), learn=False)
    piece = made.roll_out(conditions(I2V), (2, 4, 6, 4, 4), 0, generator(), learn=True)
    assert torch.allclose(piece.x0_BCFHW, whole.x0_BCFHW[:, :, 2:]) and piece.lead == 2 == len(piece.blocks)
    grad, = torch.autograd.grad(made.student_loss(piece, generator()), piece.x0_BCFHW)
    assert not grad[:, :, :2].any() and grad[:, :, 2:].all()
    assert not whole.x0_BCFHW.requires_grad


def test_a_vae_that_compresses_time_gets_a_still_as_first_latent():
    made, seen = method(I2V, replace(SMALL, gradient_frames=4)), []

    def still(latent):
        seen.append(latent)
        return torch.full_like(latent[:, :, :1], 7.0)

    made.still = still
    piece = made.roll_out(conditions(I2V), (2, 4, 6, 4, 4), 0, generator(), learn=True)
    assert seen[0].shape[2] == 3 and not seen[0].requires_grad  # the two frames before, and the one it replaces
    assert (piece.x0_BCFHW[:, :, 0] == 7).all() and (piece.conditions.y_BYFHW[:, 4:, 0] == 7).all()


# ---- losses

class Toy(nn.Module):
    """flow = a x + b (mean of w * mean(frame) over all frames that it sees) + c text: one number each."""

    params = WanParams(in_dim=1, out_dim=1, dim=2, ffn_dim=1, num_heads=1, num_layers=1, text_dim=1, freq_dim=2,
                       i2v=False, clip_dim=0)

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor(numbers, dtype=torch.float64))

    @property
    def head(self):
        return SimpleNamespace(modulation=self.numbers)

    def project_context(self, text, image):
        return text

    def forward(self, x, t, text, frame_ids, cache=None, sink_mode="write"):
        a, b, c, w = self.numbers
        value = w * x.mean((1, 3, 4))[..., None].expand(-1, -1, 2)
        if cache is not None:
            window = cache.open(frame_ids, sink_mode, 1, 1)
            value = window.layers[0].extend(value, value, value, window)[1]
        return a * x + b * value[..., 0].mean(1).view(-1, 1, 1, 1, 1) + c * text.view(-1, 1, 1, 1, 1)


def test_the_students_gradient_equals_numbers_by_hand_in_float64():
    numbers = {"student": (0.3, 0.7, -0.4, 1.3), "real": (0.9, 0.2, 0.5, 1.0), "fake": (0.6, -0.3, 0.1, 0.8)}
    toys = {name: Toy(*values) for name, values in numbers.items()}
    made = SelfRollout(**toys, settings=replace(SMALL, gradient_frames=2), block=1)
    text, away = 0.8, -0.2
    known = Conditions(texts=(torch.full((1, 1, 1), text, dtype=torch.float64),), image_BNW=None, y_BYFHW=None,
                       negative_BND=torch.full((1, 1, 1), away, dtype=torch.float64), first_BC1HW=None)
    piece = made.roll_out(known, (1, 1, 2, 2, 2), 1, generator(), learn=True)
    loss = made.student_loss(piece, generator(6))
    loss.backward()

    # by hand: two blocks of one frame, two steps each; the exit step is the second
    draw = generator()
    a, b, c, w = numbers["student"]
    sigma, x0, past, slopes = made.steps[1].sigma, [], [], []
    for _ in range(2):
        x = torch.randn(1, 1, 1, 2, 2, generator=draw).double().numpy().ravel()
        first = x - 1.0 * (a * x + b * np.mean([*past, w * x.mean()]) + c * text)
        x = (1 - sigma) * first + sigma * torch.randn(1, 1, 1, 2, 2, generator=draw).double().numpy().ravel()
        context = np.mean([*past, w * x.mean()])
        x0.append(x - sigma * (a * x + b * context + c * text))
        slopes.append([-sigma * x, np.full(4, -sigma * context), np.full(4, -sigma * text),
                       np.full(4, -sigma * b * x.mean() / (len(past) + 1))])  # by a, b, c, w; the past is fixed
        past.append(w * x0[-1].mean())
    x0 = np.stack(x0)
    draw = generator(6)
    even = torch.randint(0, 1000, (1, 1), generator=draw).item() / 1000
    level = float(np.float32(min(max(1000 * 5 * even / (1 + 4 * even), 20), 980))) / 1000
    noise = torch.randn(1, 1, 2, 2, 2, generator=draw).double().numpy().reshape(2, 4)
    noisy = (1 - level) * x0 + level * noise

    def clean(who, prompt):
        a, b, c, w = numbers[who]
        return noisy - level * (a * noisy + b * w * noisy.mean() + c * prompt)

    real = clean("real", away) + 4 * (clean("real", text) - clean("real", away))
    g = (clean("fake", text) - real) / np.abs(x0 - real).mean()
    by_hand = np.array([sum((g[k] * slopes[k][i]).sum() for k in range(2)) / x0.size for i in range(4)])
    assert piece.x0_BCFHW.detach().numpy().reshape(2, 4) == pytest.approx(x0, abs=1e-12)
    assert loss.item() == pytest.approx(0.5 * (g ** 2).mean(), rel=1e-12)
    assert toys["student"].numbers.grad.numpy() == pytest.approx(by_hand, rel=1e-10)
    assert toys["real"].numbers.grad is None and toys["fake"].numbers.grad is None

    # the fake score's loss on the same rollout: mean (flow - (noise - x0))^2, of the fake score alone
    toys["student"].zero_grad()
    loss = made.fake_loss(piece, generator(6))
    loss.backward()
    a, b, c, w = numbers["fake"]
    error = a * noisy + b * w * noisy.mean() + c * text - (noise - x0)
    assert loss.item() == pytest.approx((error ** 2).mean(), rel=1e-12)
    assert toys["fake"].numbers.grad[0].item() == pytest.approx((2 * error * noisy).mean(), rel=1e-10)
    assert toys["student"].numbers.grad is None


def test_a_perfect_or_broken_score_gives_no_gradient_instead_of_nan():
    x0 = random(2, 4, 3, 2, 2).float().requires_grad_()
    real, fake = x0.detach().clone(), x0.detach() + 1
    real[1], fake[1, 0, 0, 0, 0] = 0, float("nan")
    g = matching.matching_gradient(x0, real, fake)
    assert g.dtype == torch.float64 and not g[0].any() and g[1, 0, 0, 0, 0] == 0 and g[1, 1:].abs().min() > 0
    loss = matching.student_loss(x0, real, fake)
    assert loss.dtype == torch.float64 and torch.autograd.grad(loss, x0)[0].isfinite().all()


def test_timesteps_follow_the_papers_law():
    options = {"shift": 5, "low": 20, "high": 980, "generator": generator()}
    t = matching.draw_timesteps(4000, (3, 3), per_block=False, **options)
    assert t.shape == (4000, 6) and t.min() == 20 and t.max() == 980 and (t == t[:, :1]).all()
    assert t[:, 0].median().item() == pytest.approx(1000 * 2.5 / 3, abs=12)  # shift 5 of one half
    t = matching.draw_timesteps(50, (3, 3), per_block=True, **options)
    assert (t[:, :3] == t[:, :1]).all() and (t[:, 3:] == t[:, 3:4]).all() and (t[:, 0] != t[:, 3]).any()


# ---- image conditions: each mistake that is easily made must be noticed

class Seen:
    """Checks what every call of a network is given: its own slice of y, and clip_fea with its batch."""

    def __init__(self, known, monkeypatch, made):
        self.known, self.calls = known, []
        project, forward = CausalWan.project_context, CausalWan.forward

        def projected(net, text, image=None):
            assert (image is None) == (known.image_BNW is None)
            assert image is None or torch.equal(image, known.image_BNW)
            return project(net, text, image)

        def called(net, x, t, keys, frame_ids, cache=None, sink_mode="write", **more):
            name = next(name for name in ("student", "real", "fake") if getattr(made, name) is net)
            own = [*frame_ids]
            if known.y_BYFHW is not None:
                assert torch.equal(x[:, 4:], known.y_BYFHW[:, :, own]), (name, own)
            if known.first_BC1HW is not None and own[0] == 0:
                assert torch.equal(x[:, :4, :1], known.first_BC1HW) and not t[:, 0].any(), (name, t)
            self.calls.append((name, own[0], len(own), t[0, -1].item(), torch.is_grad_enabled()))
            return forward(net, x, t, keys, frame_ids, cache, sink_mode, **more)

        monkeypatch.setattr(CausalWan, "project_context", projected)
        monkeypatch.setattr(CausalWan, "forward", called)


def update(made, known):
    piece = made.roll_out(known, (len(known.negative_BND), 4, 6, 4, 4), 1, generator(), learn=True)
    made.student_loss(piece, generator()).backward()
    made.fake_loss(piece, generator()).backward()
    return piece


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["i2v", "first latent"])
def test_all_networks_see_the_image_in_every_call(kind, batch, monkeypatch):
    params = I2V if kind == "i2v" else T2V
    made, known = method(params), conditions(params, batch, first=kind != "i2v")
    seen = Seen(known, monkeypatch, made)
    piece = update(made, known)
    student = [call[1:] for call in seen.calls if call[0] == "student"]
    sigma = made.steps[1].timestep
    of_a_block = lambda start: [(start, 2, 1000.0, False), (start, 2, pytest.approx(sigma), True)]  # noqa: E731
    assert student == [*of_a_block(0), (0, 2, 0.0, False), *of_a_block(2), (2, 2, 0.0, False), *of_a_block(4)]
    assert [call[0] for call in seen.calls[len(student):]] == ["real", "real", "fake", "fake"]
    assert all(call[1:3] == (0, 6) for call in seen.calls[len(student):])  # the whole video at once
    if kind == "first latent":  # it is out of the losses
        assert torch.equal(piece.x0_BCFHW[:, :, :1], known.first_BC1HW) and piece.lead == 1


def forgets_a_slice(monkeypatch, made):
    flows = BlockLoop.flows

    def first_slice(loop, prompts, x, t, start, sink_mode):
        if not t.any():  # in the clean pass alone
            loop = replace(loop, y_BYFHW=loop.y_BYFHW[:, :, [0, 1] * 3])
        return flows(loop, prompts, x, t, start, sink_mode)

    monkeypatch.setattr(Rollout, "flows", first_slice)


def forgets_it_in_the_scores(monkeypatch, made):
    scored = Conditions.scored
    monkeypatch.setattr(Conditions, "scored", lambda known, *place: replace(
        scored(known, *place), y_BYFHW=torch.zeros_like(known.y_BYFHW)))


def squeezes_the_batch(monkeypatch, made):
    project = CausalWan.project_context
    monkeypatch.setattr(CausalWan, "project_context",
                        lambda net, text, image=None: project(net, text, image.squeeze(0)))


def drops_the_argument(monkeypatch, made):
    project = CausalWan.project_context
    monkeypatch.setattr(CausalWan, "project_context", lambda net, text, image=None: project(
        net, text, None if net is made.fake else image))


@pytest.mark.parametrize("mistake", [forgets_a_slice, forgets_it_in_the_scores, squeezes_the_batch, drops_the_argument],
                         ids=lambda mistake: mistake.__name__)
def test_a_mistake_with_the_conditions_is_noticed(mistake, monkeypatch):
    """The mistakes are made on purpose: the check above, or the network itself, must fail."""
    made, known = method(I2V), conditions(I2V, batch=1)
    Seen(known, monkeypatch, made)
    mistake(monkeypatch, made)
    with pytest.raises((AssertionError, ValueError)):
        update(made, known)


@pytest.mark.parametrize("change, message", [
    (lambda known: {"image_BNW": known.image_BNW[0]}, r"clip_fea has shape \[3, 5\]: it must be \[1, tokens, 5\]"),
    (lambda known: {"image_BNW": None}, "needs clip_fea and y"),
    (lambda known: {"y_BYFHW": None}, "needs clip_fea and y"),
    (lambda known: {"y_BYFHW": known.y_BYFHW[:, :4]}, r"y has shape \[1, 4, 6, 4, 4\]"),
    (lambda known: {"texts": (known.texts[0][0],)}, "A prompt has shape"),
    (lambda known: {"first_BC1HW": random(1, 4, 1, 4, 4)}, "leave first_latent away")])
def test_wrong_conditions_are_refused(change, message):
    made, known = method(I2V), conditions(I2V, batch=1)
    with pytest.raises(ValueError, match=message):
        update(made, replace(known, **change(known)))


def test_21_frames_after_an_independent_first_do_not_split_into_blocks_of_3():
    made = method(T2V, replace(SMALL, independent_first=True), block=3)
    with pytest.raises(ValueError, match="leave 20, which do not split.*1, 2, 4, 5, 10, 20"):
        made.begin(conditions(T2V), (2, 4, 21, 4, 4), 0, generator())
    assert method(T2V, block=3).plan(21).blocks == (3,) * 7


def test_an_image_that_is_a_block_of_its_own_is_not_denoised(monkeypatch):
    made, known = method(T2V, replace(SMALL, independent_first=True)), conditions(T2V, first=True)
    seen = Seen(known, monkeypatch, made)
    piece = made.roll_out(known, (2, 4, 5, 4, 4), 0, generator(), learn=True)
    assert seen.calls[0] == ("student", 0, 1, 0.0, False) and torch.equal(piece.x0_BCFHW[:, :, :1], known.first_BC1HW)
    assert piece.blocks == (1, 2, 2) and piece.lead == 1


def test_a_score_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="The teacher has in_dim 12, the student 4; i2v True, the student False"):
        SelfRollout(student=net(T2V, 1), real=net(I2V, 2), fake=net(T2V, 3), settings=SMALL, block=2)


def test_a_frozen_cache_does_not_change():
    cache = RolloutCache(T2V.cache_layout(capacity=2, sink=0, height=2, width=2, relative_sink=False), "cpu")

    def write(cache, frame, number):
        window = cache.open(range(frame, frame + 1), "write", 1, 1)
        return window.layers[0].extend(*[torch.full((1, 1, 16), float(number))] * 3, window)[0][0, :, 0].tolist()

    assert write(cache, 0, 1) == [1]
    view = cache.frozen()
    assert write(cache, 0, 2) == [2]
    assert write(view, 1, 3) == [1, 3] and write(view, 1, 4) == [1, 4] and len(cache.tensors()) == 2
