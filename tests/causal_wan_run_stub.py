"""Runs of the block-autoregressive sampler on tiny models with random weights."""

from types import SimpleNamespace

import torch
from causal_wan_stub import SIZES, load
from causal_wan_stub import tensors as weak_tensors
from stillmotion.nodes.causal_wan.conditioning import START_KEY
from stillmotion.nodes.causal_wan.run import BlockSettings, prepare
from stillmotion.nodes.causal_wan.timeline import PromptTimeline

HEIGHT, WIDTH = 4, 6


def tensors(kind="t2v"):
    """Weights large enough for cache, prompt and image to show in the result."""
    return {key: 3 * value for key, value in weak_tensors(kind).items()}


def settings(**changes):
    chosen = dict(steps="1000, 500", first_steps="", shift=5.0, warp=True, block=2, independent_first=False,
                  short_last=False, window=-1, sink=0, endless=False, context_noise=0.0, cfg=1.0, global_sink=True)
    return BlockSettings(**chosen | changes)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(kind, frames, seed):
    """A prompt of random tokens; for image to video with y and image tokens."""
    params, values = SIZES[kind], {}
    if params.i2v:
        mask = torch.ones(1, 1, frames, HEIGHT, WIDTH)
        mask[:, :, :1] = 0
        values = {"concat_latent_image": draw(20, 1, params.out_dim, 20, HEIGHT, WIDTH)[:, :, :frames],
                  "concat_mask": mask,
                  "clip_vision_output": SimpleNamespace(penultimate_hidden_states=draw(seed + 100, 1, 5, 20))}
    return [[draw(seed, 1, 5 + seed, params.text_dim), values]]


def latent(kind, frames, batch=1, start=None):
    shape = (batch, SIZES[kind].out_dim, frames, HEIGHT, WIDTH)
    if start is None:
        return {"samples": torch.zeros(shape)}
    return {"samples": draw(30, *shape), START_KEY: start}


def timeline_of(kind, frames, *starts):
    return PromptTimeline(starts, tuple([[text, {}]] for text in (
        conditioning(kind, frames, 10 + index)[0][0] for index in range(len(starts))))) if starts else None


def make_run(kind="t2v", frames=4, batch=1, start=None, switches=(), seed=3, model=None, vae=None, length=0,
             **changes):
    model = model or load(tensors(kind), weight_dtype="fp32")
    return prepare(model, conditioning(kind, frames, 1), conditioning(kind, frames, 2),
                   latent(kind, frames, batch, start), timeline_of(kind, frames, *switches), seed, settings(**changes),
                   vae, length)


def sample(*args, callback=None, **changes):
    return make_run(*args, **changes).sample(callback)["samples"]
