"""The shipped video U-Net: its file's metadata, and a quick check of generation from prompts and given frames."""
from random import Random

import numpy as np
import pytest
import torch
from stillmotion.nodes.common.demo import DYNAMICRAFTER_96, VIDEO_UNET
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.ddim.sampler import DDIMSettings, sample_latent
from stillmotion.nodes.ddim.step import Clip
from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter
from stillmotion.nodes.training.data import scenes as data
from stillmotion.nodes.training.recipes.video_unet_96 import CONFIG
from stillmotion.nodes.video_unet.nodes import LoadVideoUNet, VideoUNetConditions
from tracking import psnr, track

DEMO = VIDEO_UNET


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return LoadVideoUNet.execute("demo", "fp32").args[0], dynamicrafter.load(read_checkpoint(DYNAMICRAFTER_96))


def make(demo, prompt, given="none", images=None, seed=1):
    """uint8 frames [T, H, W, 3], generated as in the workflows."""
    model, parts = demo

    def text(words):
        return [[parts.clip.encode_from_tokens(parts.clip.tokenize(words)), {}]]
    with torch.inference_mode():
        positive, negative, latent = VideoUNetConditions.execute(
            model, text(prompt), text(""), given, 0, 0, 0, 1, images, parts.vae).args
        settings = DDIMSettings(20, 2.0, 1.0, "auto", -1.0, 1.0, 0.0, Clip("static", 3.0, False), 0, 20, "fixed")
        made = sample_latent(model, positive, negative, latent, seed, settings)[0]["samples"]
        return (parts.vae.decode(made)[0] * 255).round().to(torch.uint8).numpy()


def test_the_file_is_small_and_says_what_the_recipe_says(demo):
    assert DEMO.stat().st_size <= 6e6
    assert demo[0].model.video_unet == CONFIG


def test_prompts_decide_where_a_shape_goes(demo):
    """Four prompts; demo_quality.py checks the threshold of 90 % over 100."""
    found = {}
    for direction in data.DIRECTIONS:
        frames = make(demo, f"a blue square moves {direction} on a black background")
        found[direction] = track(frames, data.COLOURS, data.GROUNDS, data.DIRECTIONS).direction
    assert sum(direction == seen for direction, seen in found.items()) >= 3, found


def test_the_past_of_a_clip_decides_its_future(demo):
    for seed in range(2):
        truth = data.draw(data.random_object(Random(seed), held_out=True))
        made = make(demo, "", "first frames", truth[:4].float() / 255)
        assert np.mean([psnr(a, b) for a, b in zip(made[4:], truth.numpy()[4:])]) >= 22
