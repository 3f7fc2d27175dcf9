"""A tiny DynamiCrafter with random weights: as a file in the official layout, and as a MODEL to sample."""
import json
from functools import cache

import torch
from sampler_stub import settings as ddim_settings
from stillmotion.nodes.common import clip as towers
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.common.vae import vae_shapes
from stillmotion.nodes.ddim.sampler import sample_latent
from stillmotion.nodes.dynamicrafter import base
from stillmotion.nodes.dynamicrafter.config import parse, published
from stillmotion.nodes.dynamicrafter.keys import TEXT, VAE, VISION, file_key
from stillmotion.nodes.dynamicrafter.unet import VideoUNet

OPEN_CLIP = {"embed_dim": 12,
             "vision_cfg": {"image_size": 16, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8},
             "text_cfg": {"width": 16, "heads": 2, "layers": 2}}
HEADER = {"stillmotion.open_clip": json.dumps(OPEN_CLIP)}


def tiny(variant="512"):
    """A published variant's configuration, scaled down."""
    config = published(variant)
    params = config["model"]["params"]
    params["unet_config"]["params"] |= {
        "model_channels": 32, "channel_mult": [1, 2], "attention_resolutions": [1, 2], "num_res_blocks": 1,
        "num_head_channels": 8, "context_dim": 16, "use_linear": True, "dropout": 0.1, "temporal_length": 4}
    params["image_proj_stage_config"]["params"] = {
        "dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4, "embedding_dim": 24, "output_dim": 16,
        "video_length": 4}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    params["cond_stage_config"]["params"]["arch"] = "Tiny"
    params["img_cond_stage_config"] = {"params": {"arch": "Tiny"}}
    return config


def tensors(variant="512"):
    """Random weights in the official layout for `tiny(variant)`, with everything that official files also hold."""
    return dict(_tensors(variant))


@cache
@torch.inference_mode(False)  # cached across tests, whatever the first caller's mode
def _tensors(variant):
    config = parse(tiny(variant), "test")
    generator = torch.Generator().manual_seed(0)
    network = VideoUNet(config.unet, torch.nn, torch_attention, device="meta").state_dict()
    shapes = {file_key(key): value.shape for key, value in network.items()}
    for prefix, part in ((VAE, vae_shapes(config.ddconfig, 4)),
                         (TEXT, towers.text_shapes(towers.text_config(OPEN_CLIP))),
                         (VISION, towers.vision_shapes(towers.vision_config(OPEN_CLIP)))):
        shapes |= {prefix + key: shape for key, shape in part.items()}
    shapes |= {"betas": (1000,), "alphas_cumprod": (1000,), "cond_stage_model.model.logit_scale": (),
               "embedder.model.logit_scale": (), "embedder.model.positional_embedding": (77, 16)}
    found = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}
    base = config.diffusion.base_scale
    return found if base is None else found | {"scale_arr": torch.linspace(1, base, 1400)}


# ---- as a MODEL

CONFIG = parse(tiny(), "test")


def weights():
    generator = torch.Generator().manual_seed(0)
    network = VideoUNet(CONFIG.unet, torch.nn, torch_attention, device="meta")
    return {key: torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5 if value.ndim > 1
            else torch.full(value.shape, float(key.endswith("weight")))
            for key, value in network.state_dict().items()}  # keeps the scale: every branch matters


def make(given=None):
    model = base.make_model(CONFIG.unet, CONFIG.diffusion, CONFIG.scale_factor, torch.float32)
    model.diffusion_model.load_state_dict(given or weights(), assign=True)
    return base.make_patcher(model)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(frames=4, height=8, width=8, words=77, clips=1):
    shared = {"concat_latent_image": draw(clips, 4, frames, height, width), "frame_stride": 5}
    return ([[draw(1, words, 16, seed=2), {**shared, "image_tokens": draw(1, 5, 24, seed=3)}]],
            [[draw(1, 77, 16, seed=4), {**shared, "image_tokens": draw(1, 5, 24, seed=5)}]])


def sample(model, conds, steps=3, **changes):
    settings = ddim_settings(**{"steps": steps, "cfg": 4.0} | changes)
    shape = conds[0][0][1]["concat_latent_image"].shape
    with torch.inference_mode():
        return sample_latent(model, *conds, {"samples": torch.zeros(shape)}, 3, settings)[0]["samples"]


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()
