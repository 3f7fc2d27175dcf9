"""The block loop of the causal Wan family: frame arithmetic, plans, and runs compared with a slow reference."""

import pytest
import torch
from block_loop_stub import HEIGHT, WIDTH, make_inputs, make_loop, make_network, make_plan, sample, sample_slowly
from stillmotion.nodes.causal_wan.blocks import split_frames
from stillmotion.nodes.causal_wan.noise import seeded_noise
from stillmotion.nodes.causal_wan.schedule import make_sigmas, make_steps, predict_x0


def assert_same(ours, expected):
    assert ours.shape == expected.shape
    error = ((ours - expected).norm() / expected.norm()).item()
    assert error < 2e-6


@pytest.mark.parametrize("arguments, blocks", [
    ((21, 3, False, False), (3,) * 7), ((22, 3, True, False), (1,) + (3,) * 7), ((1, 3, True, False), (1,)),
    ((21, 3, True, True), (1,) + (3,) * 6 + (2,)), ((2, 3, False, True), (2,)),
    ((21, 4, True, False), (1,) + (4,) * 5)])
def test_frames_split_into_blocks(arguments, blocks):
    assert split_frames(*arguments) == blocks


def test_an_odd_length_is_refused_with_valid_blocks_and_lengths():
    with pytest.raises(ValueError) as error:
        split_frames(21, 3, True, False)
    text = str(error.value)
    assert "21 latent frames" in text and "leave 20" in text
    assert "blocks for this length: 1, 2, 4, 5, 10, 20." in text and "19 or 22 latent frames" in text


def test_lengths_below_one_block_name_the_next_valid_one():
    with pytest.raises(ValueError, match="Valid blocks for this length: 1, 2. Valid lengths for blocks of 3: 3 latent"):
        split_frames(2, 3, False, False)
    with pytest.raises(ValueError, match="at least 1"):
        split_frames(0, 3, False, True)


@pytest.mark.parametrize("changes, message", [
    ({"window": 5, "sink": 3}, "at least 6"), ({"window": 0}, "at least 3"), ({"sink": -1}, "sink is -1"),
    ({"switches": (6, 3)}, "rising frames from 1 to 8"), ({"switches": (9,)}, "from 1 to 8"),
    ({"switches": (0,)}, "from 1 to 8"), ({"context_noise": 1001.0}, "context_noise")])
def test_plans_that_cannot_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan((3, 3, 3), **changes)


def test_the_schedule_is_the_published_one():
    assert [round(step.timestep, 3) for step in make_steps([1000, 750, 500, 250], 5.0, warp=True)] == [
        1000.0, 937.5, 833.333, 625.0]
    assert make_sigmas(8.0)[0] == 1 and make_sigmas(8.0).dtype == torch.float64
    unwarped = make_steps([1000, 757, 522], 8.0, warp=False)
    assert [step.timestep for step in unwarped] == [1000, 757, 522]
    assert all(abs(step.sigma - step.timestep / 1000) < 1e-3 for step in unwarped)
    for wrong in ([], [500, 1000], [500, 0], [1001, 500]):
        with pytest.raises(ValueError, match="falling numbers"):
            make_steps(wrong, 5.0, warp=True)
    with pytest.raises(ValueError, match="shift"):
        make_sigmas(0.0)


def test_x0_is_subtracted_in_float64():
    x, flow = torch.tensor([1.0]), torch.tensor([1.0 + 2 ** -23])
    assert predict_x0(x, flow, 1 - 2 ** -30).item() == 1 - (1 + 2 ** -23) * (1 - 2 ** -30)


@pytest.mark.parametrize("blocks, settings, mechanism", [
    ((2, 2, 2), {}, {}),
    ((2, 2, 2), {"cfg": 3.0}, {}),
    ((2, 2, 1), {"context_noise": 50.0}, {"batch": 2}),
    ((1, 2, 2), {"first_steps": make_steps([1000, 750, 250], 5.0, warp=True)}, {"context": 1}),
    ((2, 2, 2, 2), {"context_noise": 300.0}, {"context": 4}),
    ((2, 2, 2), {"cfg": 2.0}, {"context": 2, "batch": 2}),
    ((3, 3), {}, {"held": 1}),
    ((1, 2, 2), {"cfg": 1.5}, {"held": 1, "i2v": True}),
    ((1, 2, 2), {}, {"context": 1, "i2v": True, "batch": 2}),
    ((2, 2, 2, 2), {"window": 5, "sink": 2, "cfg": 2.0}, {"batch": 2}),
    ((1, 3, 3, 3), {"window": 4, "sink": 1}, {"context": 1, "i2v": True}),
    ((2, 2, 2, 2), {"window": 3}, {}),
    ((2, 2, 2), {"cfg": 2.0}, {"i2v": True, "batch": 2}),
    ((3, 3, 3), {"window": 6, "sink": 3}, {"context": 3, "i2v": True, "batch": 2}),
    ((2, 2, 2, 2), {"window": 4, "sink": 1, "cfg": 2.0}, {"held": 1, "batch": 2}),
    ((2, 2, 2, 2), {"switches": (3,), "cfg": 2.0}, {"batch": 2}),
    ((2, 2, 2, 2), {"switches": (2, 5), "context_noise": 30.0}, {"context": 2, "i2v": True}),
    ((2, 2, 2, 2, 2), {"switches": (4,), "window": 4, "sink": 2}, {}),
    ((2,) * 7, {"switches": (7,), "window": 6, "sink": 2, "global_sink": False, "cfg": 1.5}, {"batch": 2}),
    ((1,) + (3,) * 5, {"switches": (6, 9), "window": 7, "sink": 1, "global_sink": False}, {"context": 1, "i2v": True}),
], ids=str)
def test_a_run_equals_an_unbatched_uncached_one(blocks, settings, mechanism):
    plan = make_plan(blocks, **settings)
    i2v = mechanism.get("i2v", False)
    network, inputs = make_network(i2v), make_inputs(plan, mechanism.get("batch", 1), i2v)
    given = {name: inputs["draw"](mechanism.get("batch", 1), 3, mechanism[name], HEIGHT, WIDTH)
             for name in ("context", "held") if name in mechanism}
    assert_same(sample(network, plan, inputs, **given), sample_slowly(network, plan, inputs, **given))


def test_guidance_one_is_the_positive_branch_alone():
    blocks = (2, 2)
    network, inputs = make_network(), make_inputs(make_plan(blocks))
    assert make_plan(blocks).branches == 1
    guided = sample(network, make_plan(blocks, cfg=1 + 1e-6), inputs)
    assert ((sample(network, make_plan(blocks), inputs) - guided).norm() / guided.norm()).item() < 1e-4


def test_a_switch_at_the_second_block_changes_only_what_follows():
    network = make_network()
    plan = make_plan((2, 2, 2), switches=(3,))
    inputs = make_inputs(plan)
    switched, plain = sample(network, plan, inputs), sample(network, make_plan((2, 2, 2)), inputs)
    assert torch.equal(switched[:, :, :4], plain[:, :, :4])
    assert ((switched - plain)[:, :, 4:].norm() / plain[:, :, 4:].norm()).item() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"window": 4, "sink": 2}, {"window": 4, "sink": 2, "switches": (5,)},
                                      {"window": 4, "sink": 2, "switches": (7,), "global_sink": False, "cfg": 2.0}])
def test_an_interrupted_run_goes_on_bit_for_bit(settings):
    network, plan = make_network(), make_plan((2,) * 6, **settings)
    inputs = make_inputs(plan)
    whole = sample(network, plan, inputs)
    for count in (1, 3, 4):
        made, draw = [], make_inputs(plan)["noise"]
        inputs["noise"] = lambda start, *place: (made.append(start), draw(start, *place))[1]
        kept = dict(enumerate(whole.split(2, dim=2)[:count]))
        assert torch.equal(sample(network, plan, inputs, recall=kept.get), whole)
        assert set(made) == set(range(2 * count, 12, 2))


def test_given_frames_must_be_whole_blocks():
    plan = make_plan((1, 3, 3))
    network, inputs = make_network(), make_inputs(plan)
    with pytest.raises(ValueError, match=r"end inside a block.*Give 1, 4 frames"):
        sample(network, plan, inputs, context=torch.zeros(1, 3, 2, HEIGHT, WIDTH))


def test_an_image_condition_of_another_length_is_refused():
    network, inputs = make_network(True), make_inputs(make_plan((2, 2)), i2v=True)
    with pytest.raises(ValueError, match="y has 4 latent frames, the video 6"):
        make_loop(network, make_plan((2, 2, 2)), inputs)


def test_blocks_come_one_by_one_and_every_step_is_told():
    plan = make_plan((2, 2, 1))
    network, inputs = make_network(), make_inputs(plan)
    told = []
    run = make_loop(network, plan, inputs, on_step=lambda block, step, x0: told.append((block, step))).run(
        None, None, None)
    with torch.inference_mode():
        first = next(run)
        assert (first.index, first.start, told) == (0, 0, [(0, 0), (0, 1)])
        assert [(block.start, block.latent_BCFHW.shape[2]) for block in run] == [(2, 2), (4, 1)]
    assert told == [(block, step) for block in range(3) for step in range(2)]


def test_noise_belongs_to_the_frame():
    short, long = seeded_noise(5, 1, 3, 4, 6), seeded_noise(5, 2, 3, 4, 6)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(short(2, 3, 1), long(0, 9, 1)[:1, :, 2:5])
    assert torch.equal(torch.get_rng_state(), state)
    other = seeded_noise(6, 1, 3, 4, 6)
    draws = torch.cat([part.flatten() for part in (long(0, 40, 0), long(0, 40, 1), other(0, 40, 0))])
    assert abs(draws.mean().item()) < 0.02 and abs(draws.std().item() - 1) < 0.02
    assert len(draws.unique()) > 0.99 * len(draws)
