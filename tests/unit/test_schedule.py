"""Schedules and DDIM tables: recorded official values, and a sweep over all user settings."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stillmotion.nodes.ddim.schedule import (
    DiffusionParams,
    make_alphas_cumprod,
    make_scale_arr,
    make_tables,
    make_timesteps,
)

RECORDED = Path(__file__).parents[1] / "cases" / "dynamicrafter_tables.safetensors"
RECORD = load_file(RECORDED)
with safe_open(RECORDED, "pt") as file:
    CASES = {name: json.loads(text) for name, text in file.metadata().items()}

EPS = DiffusionParams("eps", 0.00085, 0.012, False, None, "uniform", 0.0)
V = DiffusionParams("v", 0.00085, 0.012, False, None, "uniform", 0.0)
ZSNR = DiffusionParams("v", 0.00085, 0.012, True, 0.7, "uniform_trailing", 0.7)
# cases where eta 1 with zero terminal SNR takes the square root of a negative number, counted over 1..200 steps
NAN_STEPS = [7, 11, 14, 15, 20, 25, 33, 34, 35, 37, 38, 39, 61, 62, 63, 64, 103, 121, 122]
OUT_OF_RANGE_STEPS = [3, 9, 27, 36, 37, *range(101, 112)]


@pytest.mark.parametrize("params, name", [(EPS, "eps"), (ZSNR, "v")])
def test_schedule_equals_the_recorded_one_bit_for_bit(params, name):
    assert torch.equal(make_alphas_cumprod(params).float(), RECORD[f"{name}.alphas_cumprod"])
    if params.base_scale:
        assert torch.equal(make_scale_arr(params.base_scale).float(), RECORD[f"{name}.scale_arr"])


def test_zero_terminal_snr_ends_at_exactly_zero_and_keeps_its_start():
    plain, zero = make_alphas_cumprod(V), make_alphas_cumprod(ZSNR)
    assert zero[-1] == 0 and (zero[:-1] > 0).all() and (zero[1:] < zero[:-1]).all()
    assert abs(zero[0] - plain[0]) < 1e-15


def test_eps_with_zero_terminal_snr_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="alpha_bar is 0, so x0 = .x - eps. / 0"):
        DiffusionParams("eps", 0.00085, 0.012, True, None, "uniform", 0.0)


@pytest.mark.parametrize("changed", [{"parameterization": "x0"}, {"spacing": "quad"}])
def test_unknown_parameters_are_refused(changed):
    values = dict(parameterization="v", linear_start=0.00085, linear_end=0.012, zero_snr=False, base_scale=None,
                  spacing="uniform", guidance_rescale=0.0)
    with pytest.raises(ValueError, match="is unknown"):
        DiffusionParams(**values | changed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("eta", [0, 1])
def test_tables_equal_the_recorded_ones(case, eta):
    params = EPS if CASES[case]["parameterization"] == "eps" else ZSNR
    steps, spacing = CASES[case]["steps"], CASES[case]["spacing"]
    scale_arr = make_scale_arr(params.base_scale)
    for original, tolerance in ((True, 2e-16), (False, 4e-7)):
        tables = make_tables(make_alphas_cumprod(params), steps, spacing, eta, scale_arr, original)
        assert tables.timesteps == RECORD[f"{case}.ddim_timesteps"].tolist()
        for name in ("sigmas", "alphas", "alphas_prev"):
            recorded = RECORD[f"{case}.eta{eta}_{name}"]
            torch.testing.assert_close(getattr(tables, name), recorded, rtol=0, atol=tolerance)


def recorded_timesteps():
    for name in RECORD:
        if name.startswith("timesteps_"):
            spacing, steps = name.removeprefix("timesteps_").rsplit("_", 1)
            yield pytest.param(spacing, int(steps), RECORD[name].tolist(), id=name)


@pytest.mark.parametrize("spacing, steps, recorded", recorded_timesteps())
def test_timesteps_equal_the_recorded_ones_where_those_are_sound(spacing, steps, recorded):
    assert make_timesteps(steps, spacing, original=True) == recorded
    fixed = make_timesteps(steps, spacing)
    if len(recorded) == steps and recorded[-1] <= 999:
        assert fixed == recorded
    assert len(fixed) == steps


def official_trailing(steps):
    return (np.flip(np.round(np.arange(1000, 0, -1000 / steps))).astype(int) - 1).tolist()


def test_trailing_equals_the_official_formula_at_every_sound_step_count():
    sound = 0
    for steps in range(1, 1001):
        official = official_trailing(steps)
        assert make_timesteps(steps, "uniform_trailing", original=True) == official
        if len(official) == steps:
            sound += 1
            assert make_timesteps(steps, "uniform_trailing") == official
    assert sound == 938  # 61, 103, 121, 122, 201, ... give one step too many


def test_uniform_by_the_formula():
    for steps in range(1, 1001):
        fixed = make_timesteps(steps, "uniform")
        assert fixed == [min((i * 1000) // steps + 1, 999) for i in range(steps)]
        original = make_timesteps(steps, "uniform", original=True)
        if 1000 % steps == 0 and steps < 1000:
            assert fixed == original
        assert original == list(range(1, 1001, 1000 // steps))


@pytest.mark.parametrize("params", [EPS, V, ZSNR], ids=["eps", "v", "v_zsnr"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["uniform", "uniform_trailing"])
def test_sweep_every_table_is_finite_exact_in_length_and_in_range(params, eta, spacing):
    alphas_cumprod, scale_arr = make_alphas_cumprod(params), make_scale_arr(params.base_scale)
    for steps in range(1, 1001):
        tables = make_tables(alphas_cumprod, steps, spacing, eta, scale_arr)
        times = torch.tensor(tables.timesteps)
        assert len(tables) == len(times) == steps
        assert times.min() >= 0 and times.max() <= 999 and (times.diff() >= 0).all()
        columns = torch.stack([tables.alphas, tables.alphas_prev, tables.sigmas, tables.directions, tables.scale,
                               tables.scale_prev])
        assert columns.shape == (6, steps) and columns.dtype == torch.float64
        assert columns.isfinite().all() and (columns >= 0).all() and (columns <= 1).all()
        assert (tables.scale > 0).all()
        total = tables.alphas_prev + tables.directions ** 2 + tables.sigmas ** 2
        assert (total - 1).abs().max() < 1e-12  # the next latent has variance 1
        first = tables.step(steps - 1)
        assert first.timestep == times[-1] and first.alpha == alphas_cumprod[times[-1]]
        assert tables.step(0).alpha_prev == alphas_cumprod[0]


def test_original_tables_reproduce_the_nan_and_the_wrong_lengths():
    alphas_cumprod = make_alphas_cumprod(ZSNR)
    broken, long, out_of_range = [], [], []
    for steps in range(1, 201):
        tables = make_tables(alphas_cumprod, steps, "uniform_trailing", 1.0, original=True)
        if not tables.directions.isfinite().all():
            broken.append(steps)
        if len(tables) != steps:
            long.append(steps)
            assert tables.timesteps[0] == -1
        try:
            make_tables(alphas_cumprod, steps, "uniform", 1.0, original=True)
        except ValueError as error:
            assert "Choose the fixed tables" in str(error)
            out_of_range.append(steps)
    assert broken == NAN_STEPS
    assert long == [61, 103, 121, 122]
    assert out_of_range == OUT_OF_RANGE_STEPS
    assert len(make_timesteps(30, "uniform", original=True)) == 31
    assert len(make_timesteps(60, "uniform", original=True)) == 63


def test_a_schedule_stored_in_half_precision_still_gives_finite_tables():
    """bf16 buffers have alpha_bar 1.0 twice at the start: 0 / 0 in the official code at every step count."""
    coarse = make_alphas_cumprod(ZSNR).bfloat16()
    assert coarse[0] == coarse[1] == 1
    for steps in (2, 5, 50, 1000):
        tables = make_tables(coarse, steps, "uniform", 1.0)
        assert torch.stack([tables.sigmas, tables.directions, tables.alphas]).isfinite().all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="choose 1 to 1000"):
        make_timesteps(steps, "uniform")


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match="eta is"):
        make_tables(make_alphas_cumprod(V), 5, "uniform", eta)


def test_eta_above_1_adds_no_more_noise_than_there_is():
    tables = make_tables(make_alphas_cumprod(ZSNR), 20, "uniform_trailing", 15.0)
    total = tables.alphas_prev + tables.directions ** 2 + tables.sigmas ** 2
    assert (total - 1).abs().max() < 1e-12
