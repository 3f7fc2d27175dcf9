"""Guidance formulas, and one standard deviation per sample over all other axes."""
import pytest
import torch
from stillmotion.nodes.ddim import guidance


def randn(seed, shape=(2, 4, 3, 5, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cfg():
    uncond, cond = randn(1), randn(2)
    torch.testing.assert_close(guidance.cfg(uncond, cond, 1.0), cond)
    torch.testing.assert_close(guidance.cfg(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(guidance.cfg(uncond, cond, 7.5), 7.5 * cond - 6.5 * uncond)


def test_image_and_text_guidance():
    uncond, image, cond = randn(1), randn(2), randn(3)
    torch.testing.assert_close(guidance.cfg_image_text(uncond, image, cond, 1.0, 1.0), cond)
    torch.testing.assert_close(guidance.cfg_image_text(uncond, image, cond, 1.0, 0.0), image)
    equal = guidance.cfg_image_text(uncond, image, cond, 4.0, 4.0)
    torch.testing.assert_close(equal, guidance.cfg(uncond, cond, 4.0))
    torch.testing.assert_close(guidance.cfg_image_text(uncond, image, cond, 2.5, 7.5),
                               uncond + 2.5 * (image - uncond) + 7.5 * (cond - image))


@pytest.mark.parametrize("amount", [0.3, 0.7, 1.0])
def test_rescale_uses_one_standard_deviation_a_sample(amount):
    frames = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64).view(1, 1, 3, 1, 1)
    guided, cond = 5 * randn(1) * frames, randn(2)
    out = guidance.rescale(guided, cond, amount)
    for b in range(2):
        factor = amount * cond[b].std() / guided[b].std() + 1 - amount
        torch.testing.assert_close(out[b], guided[b] * factor)  # the same factor in every frame: no flicker


def test_rescale_0_is_off_and_a_flat_prediction_stays_finite():
    guided, flat = randn(1), torch.zeros(2, 4, 3, 5, 5)
    assert guidance.rescale(guided, randn(2), 0.0) is guided
    assert torch.equal(guidance.rescale(flat, flat, 0.7), flat)
