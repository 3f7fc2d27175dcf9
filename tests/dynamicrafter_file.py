"""A tiny DynamiCrafter with random weights in the official layout, and its configuration, for the tests."""

import json
from functools import cache

import torch
from stillmotion.nodes.common import clip as towers
from stillmotion.nodes.common.vae import vae_shapes
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.dynamicrafter.config import parse, published
from stillmotion.nodes.dynamicrafter.unet import VideoUNet

OPEN_CLIP = {"embed_dim": 12,
             "vision_cfg": {"image_size": 16, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8},
             "text_cfg": {"width": 16, "heads": 2, "layers": 2}}


def tiny(variant="512"):
    """A published variant's configuration, made small."""
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
@torch.inference_mode(False)  # whichever test asks first: they are kept for all
def _tensors(variant):
    config = parse(tiny(variant), "test")
    generator = torch.Generator().manual_seed(0)
    network = VideoUNet(config.unet, torch.nn, torch_attention, device="meta").state_dict()
    shapes = {(key if key.startswith("image_proj_model.") else f"model.diffusion_model.{key}"): value.shape
              for key, value in network.items()}
    for prefix, part in (("first_stage_model.", vae_shapes(config.ddconfig, 4)),
                         ("cond_stage_model.model.", towers.text_shapes(towers.text_config(OPEN_CLIP))),
                         ("embedder.model.visual.", towers.vision_shapes(towers.vision_config(OPEN_CLIP)))):
        shapes |= {prefix + key: shape for key, shape in part.items()}
    shapes |= {"betas": (1000,), "alphas_cumprod": (1000,), "cond_stage_model.model.logit_scale": (),
               "embedder.model.logit_scale": (), "embedder.model.positional_embedding": (77, 16)}
    found = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}
    base = config.diffusion.base_scale
    return found if base is None else found | {"scale_arr": torch.linspace(1, base, 1400)}


HEADER = {"stillmotion.open_clip": json.dumps(OPEN_CLIP)}
