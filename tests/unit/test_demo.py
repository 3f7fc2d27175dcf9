"""The built-in demo models: their size, and the sampler with real weights at step counts that used to return NaN."""

import sys
from random import Random
from types import SimpleNamespace

import comfy.utils
import latent_preview
import numpy as np
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from stillmotion.nodes.causal_wan.nodes_loading import LoadCausalWan
from stillmotion.nodes.common.demo import DYNAMICRAFTER as DEMO
from stillmotion.nodes.common.demo import DYNAMICRAFTER_96, DYNAMICRAFTER_DEMOS, FOLDER, other_encoders
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.common.notes import say_on_node
from stillmotion.nodes.common.preview import step_preview
from stillmotion.nodes.ddim.sampler import DDIMSettings, sample_latent
from stillmotion.nodes.ddim.step import Clip
from stillmotion.nodes.dynamicrafter import checkpoint
from stillmotion.nodes.dynamicrafter.conditioning import image_conditions, strangeness
from stillmotion.nodes.training.data import shapes as data
from stillmotion.nodes.video_unet import nodes as video_unet_nodes
from tracking import psnr


@pytest.fixture(scope="module")
def demo():
    return checkpoint.load(read_checkpoint(DEMO))


def test_they_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 24_000_000


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


def drawing(seed=1):
    return data.draw_clip(data.random_clip(Random(seed), held_out=True), 1).float() / 255


def test_it_knows_its_own_size_and_strength(demo):
    assert demo.vae.trained_size == demo.model.model.trained_size and max(demo.vae.trained_size) < 256
    assert (demo.model.model.diffusion_params.steps, demo.model.model.diffusion_params.cfg) == (20, 1.5)


def test_the_larger_one_draws_larger_pictures():
    large = checkpoint.load(read_checkpoint(DYNAMICRAFTER_96))
    assert large.vae.trained_size == large.model.model.trained_size == (96, 96)
    assert (large.model.model.diffusion_params.steps, large.model.model.diffusion_params.cfg) == (20, 1.5)


def test_a_demo_without_encoders_says_so_if_others_are_connected(monkeypatch):
    said = []
    monkeypatch.setattr(video_unet_nodes, "say_on_node", said.append)
    model = video_unet_nodes.LoadVideoUNet.execute("demo", "auto").args[0]
    causal = LoadCausalWan.execute("demo", "auto", "none", 1.0, "auto").args[0]
    for name, path in DYNAMICRAFTER_DEMOS.items():
        clip = checkpoint.load(read_checkpoint(path)).clip.clone()
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle moves left"))
        video_unet_nodes.VideoUNetConditions.execute(model, prompt, prompt, "none", 0, 0, 4, 1)
        note, of_causal = said.pop(), other_encoders(causal, prompt)
        assert ('to "demo, 96x96": this model needs its CLIP' in note) == (name == "demo") == bool(note)
        assert ('to "demo, 96x96": this model needs its CLIP' in of_causal) == (name == "demo") == bool(of_causal)
        assert other_encoders(SimpleNamespace(model=SimpleNamespace()), prompt) == ""


def test_it_says_when_an_input_is_nothing_like_what_it_knows(demo):
    own = demo.vae.trained_size
    with torch.inference_mode():
        assert strangeness(demo.vae, drawing(), *own, own) == ""
        noise = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)).round()
        assert "choose a real checkpoint in Load DynamiCrafter" in strangeness(demo.vae, noise, *own, own)
        assert "512 x 320, but this model was trained with" in strangeness(demo.vae, drawing(), 512, 320, own)
        assert strangeness(demo.vae, noise, 512, 320, None) == strangeness(demo.vae, noise, 512, 320, (512, 320)) == ""


def test_what_it_says_is_shown_on_the_node(monkeypatch, caplog):
    told = []
    instance = SimpleNamespace(client_id="page", last_node_id="5", send_progress_text=lambda *sent: told.append(sent))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    say_on_node("too large")
    say_on_node("")
    monkeypatch.delitem(sys.modules, "server")
    say_on_node("only in the log")
    assert told == [("Stillmotion: too large", "5", "page")] and "only in the log" in caplog.text


@pytest.mark.parametrize("prepare", [step_preview, latent_preview.prepare_callback], ids=["DDIM", "KSampler"])
def test_its_preview_has_the_colours_of_the_video_and_moves(demo, prepare, monkeypatch):
    shown = []
    if prepare is latent_preview.prepare_callback:  # core shows a preview only if a method is chosen
        monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, **_: shown.append((value, total, preview)))
    clip = data.draw_clip(data.random_clip(Random(3), held_out=True), 16).float() / 255
    with torch.inference_mode():
        latent = demo.model.model.process_latent_in(demo.vae.encode(clip))
        for _ in range(2):  # each run starts at the first frame
            callback = prepare(demo.model, 16)
            for step in range(16):
                callback(step, latent, latent, 16)
    frames = [np.asarray(picture) for _, _, (_, picture, _) in shown]
    assert all(psnr(frame, (true * 255).numpy()) > 25 for frame, true in zip(frames, [*clip, *clip]))
    assert not np.array_equal(frames[0], frames[8])
    assert [value for value, *_ in shown] == [*range(1, 17)] * 2  # one bar a run, and it ends at the total once
