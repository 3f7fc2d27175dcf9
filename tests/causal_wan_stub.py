"""Tiny causal Wan models with random weights, and runs of the block-autoregressive sampler on them."""

import json
from functools import cache
from types import SimpleNamespace

import comfy.model_management
import torch
from stillmotion.nodes.causal_wan import checkpoint as loader
from stillmotion.nodes.causal_wan.conditioning import START_KEY
from stillmotion.nodes.causal_wan.model import CausalWan, WanParams
from stillmotion.nodes.causal_wan.run import BlockSettings, prepare
from stillmotion.nodes.causal_wan.timeline import PromptTimeline
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.common.files import Checkpoint, unwrapped

HEADER = {"config": json.dumps({"num_heads": 4, "scale_factor": 0.5, "transformer": {"causal_ar": True}})}
NETWORK = {"in_dim": 16, "out_dim": 16, "dim": 48, "ffn_dim": 80, "num_heads": 4, "num_layers": 2, "text_dim": 24,
           "freq_dim": 32, "i2v": False, "clip_dim": 0}
SIZES = {"t2v": WanParams(**NETWORK),
         "i2v": WanParams(**NETWORK | {"in_dim": 36, "i2v": True, "clip_dim": 20}),
         "small": WanParams(**NETWORK | {"in_dim": 12, "out_dim": 4, "i2v": True, "clip_dim": 20})}


def tensors(kind="t2v", seed=0):
    """Random weights of a tiny model in native keys."""
    return dict(_tensors(kind, seed))


@cache
@torch.inference_mode(False)  # cached across tests, whatever the first caller's mode
def _tensors(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    network = CausalWan(SIZES[kind], torch.nn, torch_attention, device="meta").state_dict()
    return {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in network.items()}


def load(found, metadata=HEADER, path="causal.safetensors", **options):
    return loader.load(Checkpoint(path, unwrapped(found, path), metadata), **options)


def weights_of(model):
    return model.model.diffusion_model.state_dict()


def same(model, expected):
    found = weights_of(model)
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def prefixed(prefix, found):
    return {prefix + key: value for key, value in found.items()}


def run(model, kind="t2v"):
    """The loaded MODEL's x0 for a fixed input, computed the way core's samplers do."""
    generator = torch.Generator().manual_seed(9)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    params = SIZES[kind]
    image = {"clip_fea": noise(1, 5, params.clip_dim)} if params.i2v else {}
    y = noise(1, params.in_dim - params.out_dim, 3, 4, 6) if params.i2v else None
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return model.model.apply_model(noise(1, params.out_dim, 3, 4, 6), torch.tensor([0.7]), c_concat=y,
                                   c_crossattn=noise(1, 7, params.text_dim), **image)


# ---- LoRAs

LAYERS = [f"blocks.{block}.{layer}" for block in range(2) for layer in
          ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
           "cross_attn.o", "ffn.0", "ffn.2")]


def lora_halves(rank=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    found = tensors()
    return {layer: (torch.randn(rank, found[f"{layer}.weight"].shape[1], generator=generator),
                    torch.randn(found[f"{layer}.weight"].shape[0], rank, generator=generator)) for layer in LAYERS}


def named(prefix, down="lora_A.weight", up="lora_B.weight", replace=(".", ".")):
    return {f"{prefix}{layer.replace(*replace)}.{name}": value for layer, pair in lora_halves().items()
            for name, value in zip((down, up), pair)}


# ---- layers in 8 bits

SMALL = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")]
EIGHT = torch.float8_e4m3fn


def stored(kind=EIGHT):
    """A tiny model with `SMALL` in 8 bits: its tensors without scales, the scales, and the dequantized values."""
    found, scales, meant = tensors(), {}, tensors()
    largest = 127 if kind == torch.int8 else torch.finfo(kind).max
    for layer in SMALL:
        weight = found[f"{layer}.weight"]
        scales[layer] = weight.abs().amax() / largest
        small = weight / scales[layer]
        found[f"{layer}.weight"] = (small.round() if kind == torch.int8 else small).to(kind)
        meant[f"{layer}.weight"] = found[f"{layer}.weight"].float() * scales[layer]
    return found, scales, meant


def mark(**settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def marked(found, scales, name="float8_e4m3fn"):
    return found | {f"{layer}.weight_scale": scale for layer, scale in scales.items()} | {
        f"{layer}.comfy_quant": mark(format=name) for layer in scales}, HEADER


# ---- runs of the sampler

HEIGHT, WIDTH = 4, 6


def strong_tensors(kind="t2v"):
    """Weights large enough for cache, prompt and image to affect the result."""
    return {key: 3 * value for key, value in tensors(kind).items()}


def settings(**changes):
    chosen = dict(steps="1000, 500", first_steps="", shift=5.0, warp=True, block=2, independent_first=False,
                  short_last=False, window=-1, sink=0, endless=False, context_noise=0.0, cfg=1.0, global_sink=True)
    return BlockSettings(**chosen | changes)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(kind, frames, seed):
    """A prompt of random tokens; for image-to-video also y and image tokens."""
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
    model = model or load(strong_tensors(kind), weight_dtype="fp32")
    return prepare(model, conditioning(kind, frames, 1), conditioning(kind, frames, 2),
                   latent(kind, frames, batch, start), timeline_of(kind, frames, *switches), seed, settings(**changes),
                   vae, length)


def sample(*args, callback=None, **changes):
    return make_run(*args, **changes).sample(callback)["samples"]
