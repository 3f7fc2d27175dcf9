"""Recipe of the built-in demo model: a miniature DynamiCrafter, trained on Moving Shapes.

Four stages, each resumable: the autoencoder, the two CLIP towers, the cached encodings, the denoiser.
`export` writes them to one file in the official key layout, with the configuration in its header.
"""
from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

from ...common.clip import IMAGE_MEAN, IMAGE_STD, squash
from ...common.files import without_zero_rows
from ...ddim.schedule import DiffusionParams, make_alphas_cumprod, make_scale_arr
from ...dynamicrafter.resampler import ResamplerParams
from ...dynamicrafter.unet import UNetParams, VideoUNet
from .. import objectives
from ..data import shapes as data
from ..families.dynamicrafter import fresh_network
from ..loop import fit
from . import parts
from .laws import noisy_timesteps

FRAMES = 16
FIXED_CLIPS = 4800          # clips with cached encodings
RETURNING = 0.1             # fraction of clips that move out and back, for loops
SCALE_FACTOR = 0.18215      # as in Stable Diffusion; the demo's latents are standardised to fit it

OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}
ARCH = "stillmotion-demo"
DDCONFIG = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 1, 1, 2], "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}
UNET = {
    "in_channels": 8, "out_channels": 4, "model_channels": 32, "attention_resolutions": [2], "num_res_blocks": 1,
    "channel_mult": [1, 2], "dropout": 0.0, "num_head_channels": 8, "transformer_depth": 1, "context_dim": 32,
    "use_linear": True, "use_checkpoint": False, "temporal_conv": True, "temporal_attention": True,
    "temporal_selfatt_only": True, "use_relative_position": False, "use_causal_attention": False,
    "temporal_length": FRAMES, "addition_attention": True, "image_cross_attention": True, "default_fs": 18,
    "fs_condition": True, "image_cross_attention_scale_learnable": False,
}
RESAMPLER = {"dim": 32, "depth": 1, "dim_head": 16, "heads": 2, "num_queries": 16, "embedding_dim": 48,
             "output_dim": 32, "ff_mult": 2, "video_length": FRAMES}
CONFIG = {"model": {"target": "lvdm.models.ddpm3d.LatentVisualDiffusion", "params": {
    "rescale_betas_zero_snr": True, "parameterization": "v", "linear_start": 0.00085, "linear_end": 0.012,
    "timesteps": 1000, "conditioning_key": "hybrid", "image_size": [8, 8], "channels": 4, "scale_by_std": False,
    "scale_factor": SCALE_FACTOR, "uncond_type": "empty_seq", "use_dynamic_rescale": True, "base_scale": 0.7,
    "fps_condition_type": "fps", "perframe_ae": True,
    "unet_config": {"target": "lvdm.modules.networks.openaimodel3d.UNetModel", "params": UNET},
    "first_stage_config": {"target": "lvdm.models.autoencoder.AutoencoderKL",
                           "params": {"embed_dim": 4, "ddconfig": DDCONFIG}},
    "cond_stage_config": {"target": "lvdm.modules.encoders.condition.FrozenOpenCLIPEmbedder",
                          "params": {"layer": "penultimate", "arch": ARCH}},
    "img_cond_stage_config": {"target": "lvdm.modules.encoders.condition.FrozenOpenCLIPImageEmbedderV2",
                              "params": {"arch": ARCH}},
    "image_proj_stage_config": {"target": "lvdm.modules.encoders.resampler.Resampler", "params": RESAMPLER}}}}


def random_still(rng: Random, edge: int = 64) -> Tensor:
    """A frame [3, 64, 64] in [-1, 1] with the shape anywhere that training or sampling may place it, or a crop of
    `edge` pixels around the shape."""
    clip = data.random_clip(rng, held_out=None)
    reach = edge / 2 - 2 - clip.radius * 1.4
    place = {"x": edge / 2 + rng.uniform(-reach, reach), "y": edge / 2 + rng.uniform(-reach, reach)}
    frame_HWC = data.draw_clip(replace(clip, size=edge, **place), frames=1)[0]
    return frame_HWC.movedim(-1, 0).float() / 127.5 - 1


def stills(count: int) -> Tensor:
    """[count, 3, 64, 64], deterministic."""
    rng = Random(7)
    return torch.stack([random_still(rng) for _ in range(count)])


def train_autoencoder(folder: Path, cutout_steps: int = 4000, steps: int = 400, batch: int = 16) -> nn.Module:
    """AutoencoderKL whose latent mean has zero mean and unit variance after the usual factor 0.18215.

    Crops around the shape come first: a quarter of the compute, and nearly all there is to learn.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=4, ddconfig=DDCONFIG)
    for module in vae.modules():  # ComfyUI's layers override this method and leave their weights uninitialised
        for layer in (nn.Conv2d, nn.GroupNorm):
            if isinstance(module, layer):
                layer.reset_parameters(module)

    def stage(vae: nn.Module, name: str, steps: int, lr: float, edge: int) -> nn.Module:
        rng = Random()

        def loss_of(number: int, generator: torch.Generator) -> Tensor:
            rng.seed(generator.initial_seed())
            images = torch.stack([random_still(rng, edge) for _ in range(batch)])
            return objectives.autoencoder_loss(vae, images, generator, kl_weight=3e-4, emphasis=4)

        return fit(vae, loss_of, steps=steps, lr=lr, checkpoint=folder / f"{name}.pt", ema_decay=0.99, save_every=100)

    vae = stage(vae, "autoencoder_cutouts", cutout_steps, 2e-3, edge=32)
    vae = stage(vae, "autoencoder", steps, 1e-3, edge=64)
    standardise_latents(vae, stills(512))
    return vae.eval()


@torch.no_grad()
def standardise_latents(vae: nn.Module, images_BCHW: Tensor) -> None:
    """Fold the latents' scale and offset into the two 1x1 convolutions around them; decoded images do not change."""
    mean = vae.quant_conv(vae.encoder(images_BCHW))[:, :4]
    offset, scale = mean.mean(dim=(0, 2, 3)), 1 / (SCALE_FACTOR * mean.std(dim=(0, 2, 3)))
    inner, outer = vae.post_quant_conv, vae.quant_conv
    inner.bias += inner.weight[:, :, 0, 0] @ offset
    inner.weight /= scale.view(1, 4, 1, 1)
    outer.bias[:4] = (outer.bias[:4] - offset) * scale
    outer.weight[:4] *= scale.view(4, 1, 1, 1)
    outer.bias[4:] += 2 * scale.log()


def all_captions() -> list[str]:
    """Every training caption, with the empty caption of unconditional guidance first."""
    return [""] + [form.format(shape=shape, colour=colour, background=ground, direction=direction)
                   for form in data.CAPTION_FORMS[:data.HELD_OUT_FORM] for shape in data.SHAPES
                   for colour in data.COLOURS for ground in data.BACKGROUNDS for direction in data.DIRECTIONS
                   if not data.is_held_out(shape, colour, direction)]


def exposure(clip: data.ShapeClip, rng: Random) -> Tensor:
    """A still [3, 64, 64] in [-1, 1] that shows the motion: frames blended with increasing weight, as a fading trail.
    Stills alone would teach the text tower nothing about directions."""
    frames_THWC = data.draw_clip(clip, FRAMES * 2).float()
    weights = torch.linspace(0, 1, len(frames_THWC)) ** rng.uniform(0.5, 4)
    blended = (frames_THWC * (weights / weights.sum())[:, None, None, None]).sum(0)
    return blended.movedim(-1, 0) / 127.5 - 1


def tower_pixels(images_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1], preprocessed for the vision tower as in sampling."""
    mean, std = (images_BCHW.new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return ((squash(images_BCHW, OPEN_CLIP["vision_cfg"]["image_size"]) + 1) / 2 - mean) / std


def training_caption(clip: data.ShapeClip, rng: Random) -> str:
    """A training template, with its words shuffled in one case in four: the words matter, not their positions."""
    caption = clip.caption(rng.randrange(data.HELD_OUT_FORM))
    words = caption.split()
    return " ".join(rng.sample(words, len(words))) if rng.random() < 0.25 else caption


def train_towers(folder: Path, steps: int = 500, batch: int = 96) -> nn.Module:
    """The two CLIP towers, trained contrastively, while the text tower also classifies the attributes in a caption.

    Images of such small shapes teach little about direction and shape. Without the second loss the text tower encodes
    both only in the word's own token, where the denoiser learns to use them late or never.
    """
    torch.manual_seed(1)
    tokenize = SimpleTokenizer(context_length=77)
    named = [data.SHAPES, tuple(data.COLOURS), tuple(data.BACKGROUNDS), tuple(data.DIRECTIONS)]
    nets = nn.ModuleDict({"clip": CLIP(**OPEN_CLIP),
                          "heads": nn.Linear(OPEN_CLIP["embed_dim"], sum(map(len, named)))})
    rng = Random()

    def loss_of(number: int, generator: torch.Generator) -> Tensor:
        rng.seed(generator.initial_seed())
        clips = [data.random_clip(rng) for _ in range(batch)]
        images = torch.stack([exposure(c, rng) for c in clips])
        tokens = tokenize([training_caption(c, rng) for c in clips])
        said_BA = torch.tensor([[names.index(value) for names, value in
                                 zip(named, (c.shape, c.colour, c.background, c.direction))] for c in clips])
        scores = nets["heads"](text_features(nets["clip"], tokens).mean(1)).split(list(map(len, named)), dim=1)
        return (objectives.contrastive_loss(nets["clip"], tower_pixels(images), tokens)
                + objectives.attribute_loss(scores, said_BA))

    clip = fit(nets, loss_of, steps=steps, lr=2e-3, checkpoint=folder / "towers.pt", ema_decay=0.98,
               save_every=50)["clip"]
    seen = torch.zeros(len(clip.token_embedding.weight), 1)
    seen[tokenize(all_captions()).unique()] = 1
    clip.token_embedding.weight.data.mul_(seen)  # untrained rows carry no information, and zeros compress
    return clip.eval()


def text_features(clip: nn.Module, tokens_BL: Tensor) -> Tensor:
    """[B, 77, width]: the penultimate block, then ln_final, as DynamiCrafter uses its text tower."""
    x_BLC = clip.token_embedding(tokens_BL) + clip.positional_embedding
    for block in clip.transformer.resblocks[:-1]:
        x_BLC = block(x_BLC, attn_mask=clip.attn_mask)
    return clip.ln_final(x_BLC)


@torch.no_grad()
def image_features(clip: nn.Module, images_BCHW: Tensor) -> Tensor:
    """[B, 1 + patches, width] for images in [-1, 1]: all tokens after the last block, without the final norm."""
    visual = clip.visual
    x_BNW = visual.conv1(tower_pixels(images_BCHW)).flatten(2).transpose(1, 2)
    first = visual.class_embedding.expand(len(x_BNW), 1, -1)
    return visual.transformer(visual.ln_pre(torch.cat((first, x_BNW), dim=1) + visual.positional_embedding))


@torch.no_grad()
def encode_clips(folder: Path, vae: nn.Module, clip: nn.Module, count: int = FIXED_CLIPS) -> dict[str, Tensor]:
    """Encode `count` clips once: the encodings stay fixed while the denoiser is trained.

    latents [K, 4, T, h, w] (scaled), tokens [K, N, W], fs [K], ends [K] (1: a clip that returns, for both-ends
    conditioning only), caption [K, forms] (index into text), text [captions, 77, C], grey [1, N, W].
    """
    path = folder / "encodings.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    rng, captions = Random(2), all_captions()
    index = {caption: i for i, caption in enumerate(captions)}
    clips = [data.random_clip(rng, returns=i < count * RETURNING) for i in range(count)]
    latents, tokens = [], []
    for i, described in enumerate(clips):
        frames_TCHW = data.draw_clip(described, FRAMES).movedim(-1, 1).float() / 127.5 - 1
        latents.append((vae.quant_conv(vae.encoder(frames_TCHW))[:, :4] * SCALE_FACTOR).transpose(0, 1).half())
        tokens.append(image_features(clip, frames_TCHW[:1])[0])
        if (i + 1) % 500 == 0:
            logging.info("encoded %d / %d clips", i + 1, count)
    encodings = {
        "latents": torch.stack(latents), "tokens": torch.stack(tokens),
        "text": text_features(clip, SimpleTokenizer(context_length=77)(captions)),
        "grey": image_features(clip, torch.zeros(1, 3, 64, 64)), "fs": torch.tensor([c.fs for c in clips]),
        "ends": torch.tensor([c.returns for c in clips]),
        "caption": torch.tensor([[index[c.caption(form)] for form in range(data.HELD_OUT_FORM)] for c in clips]),
    }
    torch.save(encodings, path)
    return encodings


def demo_unet() -> VideoUNet:
    """The untrained network, with zero-initialised last layers so that every block starts as the identity."""
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in UNET.items()
             if name in UNetParams.__dataclass_fields__}
    return fresh_network(UNetParams(**sizes, resampler=ResamplerParams(**RESAMPLER)), seed=3)


def train_unet(folder: Path, encodings: dict[str, Tensor], steps: int = 5000, batch: int = 8, lr: float = 1e-3,
               on_save=None) -> nn.Module:
    """The denoiser with its image projector, trained on cached encodings.

    Text and image are each dropped in one sample in ten, independently; a third of the clips, and all that return, are
    conditioned on both ends, the rest on the first frame.
    """
    schedule = DiffusionParams(parameterization="v", linear_start=0.00085, linear_end=0.012, zero_snr=True,
                               base_scale=0.7, spacing="uniform_trailing", guidance_rescale=0.7)
    alphas, scale = make_alphas_cumprod(schedule).float(), make_scale_arr(schedule.base_scale).float()
    unet = demo_unet()

    def loss_of(number: int, generator: torch.Generator) -> Tensor:
        def chance(share: float) -> Tensor:
            return torch.rand(batch, generator=generator) < share
        pick = torch.randint(0, len(encodings["fs"]), (batch,), generator=generator)
        form = torch.randint(0, data.HELD_OUT_FORM, (batch,), generator=generator)
        z = encodings["latents"][pick].float()
        caption = torch.where(chance(0.1), 0, encodings["caption"][pick, form])
        tokens = torch.where(chance(0.1)[:, None, None], encodings["grey"], encodings["tokens"][pick])
        condition = objectives.concat_condition(z, encodings["ends"][pick] | chance(1 / 3))
        return objectives.video_v_loss(unet, z, condition, encodings["text"][caption], tokens, encodings["fs"][pick],
                                       alphas, scale, generator, emphasis=5,
                                       timesteps=noisy_timesteps)

    return fit(unet, loss_of, steps=steps, lr=lr, checkpoint=folder / "unet.pt", ema_decay=0.998, save_every=100,
               on_save=on_save).eval()


def export(path: Path, vae: nn.Module, clip: nn.Module, unet: nn.Module, config: dict = CONFIG) -> None:
    """Write everything in fp16 in the official key layout, of the token embedding only the rows in use."""
    weights = {}
    for part, net in (("autoencoder", vae), ("towers", clip), ("unet", unet)):
        weights |= parts.tensors_of(part, net)
    save_file(without_zero_rows(weights, parts.TABLE), path,
              metadata={"format": "pt", "stillmotion.config": json.dumps(config),
                        "stillmotion.open_clip": json.dumps(OPEN_CLIP)})


def make_demo(folder: Path, target: Path) -> None:
    """Run all stages in `folder`, resuming what is there, then write the file."""
    folder.mkdir(parents=True, exist_ok=True)
    vae, clip = train_autoencoder(folder), train_towers(folder)
    export(target, vae, clip, train_unet(folder, encode_clips(folder, vae, clip)))
