"""The built-in demo model: its size, and the sampler with real weights at step counts that used to return NaN."""

from random import Random

import pytest
import torch
from stillmotion.nodes.common.demo import DYNAMICRAFTER as DEMO
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.ddim.sampler import DDIMSettings, sample_latent
from stillmotion.nodes.ddim.step import Clip
from stillmotion.nodes.dynamicrafter import checkpoint
from stillmotion.nodes.dynamicrafter.conditioning import image_conditions
from stillmotion.nodes.training.data import shapes as data


@pytest.fixture(scope="module")
def demo():
    return checkpoint.load(read_checkpoint(DEMO))


def test_it_is_small():
    assert DEMO.stat().st_size <= 10_000_000


@pytest.mark.parametrize("steps", [7, 20, 25, 61, 122])
def test_steps_that_used_to_be_nan(demo, steps):
    clip = data.random_clip(Random(steps), held_out=True)
    image = data.draw_clip(clip, 1).float() / 255
    settings = DDIMSettings(steps=steps, cfg=1.5, eta=1.0, spacing="auto", guidance_rescale=-1.0, denoise=1.0,
                            image_cfg=0.0, clip=Clip("off", 3.0, False), start_step=0, end_step=1000, tables="fixed")
    with torch.inference_mode():
        latent, tokens, grey = image_conditions(demo.clip_vision, demo.vae, image, None, "animate", 64, 64, 16, 1)
        positive, negative = ([[demo.clip.encode_from_tokens(demo.clip.tokenize(text)),
                                {"concat_latent_image": latent, "frame_stride": 0, "image_tokens": seen}]]
                              for text, seen in ((clip.caption(), tokens), ("", grey)))
        result, report = sample_latent(demo.model, positive, negative, {"samples": torch.zeros_like(latent)}, steps,
                                       settings)
        frames = demo.vae.decode(result["samples"])
    assert len(report.timesteps) == steps and report.verdict()[0] == "good", report.text()
    assert frames.isfinite().all() and frames.std() > 0.01
