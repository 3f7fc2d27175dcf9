"""The DDIM step and x0 clipping on numbers simple enough to check by hand."""
import math

import pytest
import torch
from stillmotion.nodes.ddim.schedule import DiffusionParams, StepCoefficients, make_alphas_cumprod, make_tables
from stillmotion.nodes.ddim.step import Clip, clip_x0, ddim_step, predict

OFF = Clip("off", 3.0, False)
SHAPE = (2, 4, 3, 2, 2)


def randn(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.004])
def test_predict_undoes_the_forward_process(parameterization, alpha):
    x0, eps = randn(1), randn(2)
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    output = eps if parameterization == "eps" else signal * eps - noise * x0
    found = predict(signal * x0 + noise * eps, output, parameterization, alpha)
    torch.testing.assert_close(found, (x0, eps))


def test_predict_v_at_zero_signal():
    x, v = randn(1), randn(2)
    torch.testing.assert_close(predict(x, v, "v", 0.0), (-v, x))


def test_step_by_hand():
    """alpha 0.36 -> 0.64, sigma 0.3, direction sqrt(1 - 0.64 - 0.09), rescale 1.1."""
    c = StepCoefficients(500, 0.36, 0.64, 0.3, math.sqrt(0.27), 1.1)
    x, eps, noise = randn(1), randn(2), randn(3)
    step = ddim_step(x, eps, "eps", c, OFF, noise)
    x0 = (x - 0.8 * eps) / 0.6
    torch.testing.assert_close(step.x0_raw, x0)
    torch.testing.assert_close(step.x0, 1.1 * x0)
    torch.testing.assert_close(step.x, 0.8 * 1.1 * x0 + math.sqrt(0.27) * eps + 0.3 * noise)


def test_eps_stays_unless_recomputed_when_x0_is_clipped():
    c = StepCoefficients(500, 0.36, 0.64, 0.0, 0.6, 1.0)
    x, eps = 3 * randn(1), randn(2)
    clipped = ((x - 0.8 * eps) / 0.6).clamp(-1, 1)
    kept = ddim_step(x, eps, "eps", c, Clip("static", 1.0, False), None).x
    torch.testing.assert_close(kept, 0.8 * clipped + 0.6 * eps)
    again = ddim_step(x, eps, "eps", c, Clip("static", 1.0, True), None).x
    torch.testing.assert_close(again, 0.8 * clipped + 0.6 * (x - 0.6 * clipped) / 0.8)
    assert (kept - again).abs().max() > 0.1


def test_a_perfect_model_is_followed_to_the_clean_latent_at_any_step_count():
    params = DiffusionParams("v", 0.00085, 0.012, True, None, "uniform_trailing", 0.0)
    alphas_cumprod = make_alphas_cumprod(params)
    x0 = randn(1)
    for steps in (1, 7, 20, 25, 61, 122):
        tables = make_tables(alphas_cumprod, steps, "uniform_trailing", 1.0)
        x = randn(2)
        for index in reversed(range(steps)):
            c = tables.step(index)
            eps = (x - math.sqrt(c.alpha) * x0) / math.sqrt(1 - c.alpha)
            v = math.sqrt(c.alpha) * eps - math.sqrt(1 - c.alpha) * x0
            x = ddim_step(x, v, "v", c, OFF, randn(100 + index)).x
        left = (x - math.sqrt(alphas_cumprod[0]) * x0).std()
        assert left < 1.2 * math.sqrt(1 - alphas_cumprod[0])


def test_static_clip():
    x0 = torch.tensor([-5.0, -3.0, 0.5, 7.0]).view(1, 1, 2, 2)
    assert clip_x0(x0, Clip("static", 3.0, False)).flatten().tolist() == [-3.0, -3.0, 0.5, 3.0]
    assert clip_x0(x0, OFF) is x0


def test_dynamic_clip_shrinks_only_the_samples_that_need_it():
    calm, wild = randn(1)[:1].clamp(-2, 2), 10 * randn(2)[:1]
    out = clip_x0(torch.cat([calm, wild]), Clip("dynamic", 3.0, False))
    assert torch.equal(out[:1], calm)
    assert out[1].abs().max() == 3.0
    reach = torch.quantile(wild.abs().flatten(), 0.995)
    torch.testing.assert_close(out[1:], wild.clamp(-reach, reach) * 3 / reach)


@pytest.mark.parametrize("mode, limit, words", [("hard", 3.0, "Choose one of off"), ("static", 0.0, "above 0"),
                                                ("static", float("nan"), "above 0")])
def test_bad_clip(mode, limit, words):
    with pytest.raises(ValueError, match=words):
        Clip(mode, limit, False)
