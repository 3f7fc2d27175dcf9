"""Training the video U-Net: clips generated from text, or continued from given frames."""
from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...common.demo import SIZES, VIDEO_UNET
from ...common.files import Checkpoint, read_checkpoint
from ...ddim.schedule import make_alphas_cumprod
from ...video_unet import checkpoint
from ...video_unet.config import TEXT_ENCODERS, VideoUNetConfig
from ...video_unet.unet import GROUPS, Block, VideoUNet, VideoUNetParams, new_network
from .. import objectives
from ..config import TrainConfig
from ..encoding import Encoded, Encoders
from ..load import load_class
from .base import CLIP_3, Family, chosen, clip_latent, ddim, plain_weights

log = logging.getLogger(__name__)

DEMOS = {"demo": VIDEO_UNET}
MEASURED = 16  # clips used to measure the scale of new latents
TASKS = (("text", 0.5), ("first", 0.15), ("past", 0.3), ("ends", 0.05))  # fraction of samples


class VideoUNetTraining(Family):
    blocks = (Block,)
    lora_targets = (".spatial.", ".text.", ".temporal.")

    def __init__(self, net: VideoUNet, config: VideoUNetConfig, encoders: Encoders, settings: TrainConfig):
        self.kind = type(net)
        self.net, self.config, self.encoders, self.emphasis = net, config, encoders, settings.emphasis
        self.timesteps = partial(objectives.draw_timesteps, law=settings.timesteps)
        self.alphas = make_alphas_cumprod(config.diffusion)
        self.empty_1LC = self.empty_text()
        if self.empty_1LC.shape[-1] != config.params.context_dim:
            raise ValueError(f"The text encoder gives tokens {self.empty_1LC.shape[-1]} wide; this model was trained "
                             f"with {config.text_encoder}, {config.params.context_dim} wide. Connect that CLIP.")
        if config.text_encoder not in names_of(encoders):
            log.warning("This model was trained with the encoders of %s; given are those of %s. If the loss begins "
                        "high, use its own (encoders in train.py).", config.text_encoder, names_of(encoders)[0])
        if (encoders.vae is None) != (config.space == "pixels"):
            raise ValueError(f"This model works in {config.space}: " + (
                "disconnect the VAE." if encoders.vae else "connect the VAE that its latents are of."))

    def encode(self, item: dict) -> Encoded:
        z_CTHW = clip_latent(item, self.encoders) * self.config.scale_factor
        if z_CTHW.shape[0] != self.config.params.channels:
            raise ValueError(f"The clip {item['name']} has {z_CTHW.shape[0]} channels in {self.config.space}, this "
                             f"model takes {self.config.params.channels}: use the VAE that it was trained with.")
        encoded = {"z": z_CTHW, "text": self.encoders.text(item["caption"])}
        width = self.config.params.additional_condition_dim
        if width != len(item.get("condition", ())):
            raise ValueError(f"The clip {item['name']} has {len(item.get('condition', ())) or 'no'} numbers of an "
                             f"additional condition, this model takes {width or 'none'}: use a data set with "
                             f"additional_condition_dim {width}.")
        return encoded | ({"condition": item["condition"]} if width else {})

    def loss(self, net: nn.Module, batch: Encoded, generator: torch.Generator, dropout: float) -> Tensor:
        z, text = batch["z"], batch["text"]
        dropped = chosen(len(z), dropout, generator, z.device)[:, None, None]
        mask_BT = torch.zeros(len(z), z.shape[2]) if z.shape[2] < 2 else \
            draw_masks(torch.zeros(len(z), dtype=torch.bool), z.shape[2], generator)
        return objectives.video_unet_loss(net, z, mask_BT.to(z), torch.where(dropped, self.empty_1LC.to(text), text),
                                          self.alphas.float(), self.config.prediction, generator, self.emphasis,
                                          batch.get("condition"), self.timesteps)

    def sample(self, net: nn.Module, batch: Encoded, seed: int) -> dict[str, tuple[Tensor, int]]:
        """From the text alone, and with the first quarter of the frames given (for clips of more than one frame)."""
        z, given = batch["z"], max(1, batch["z"].shape[2] // 4)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)

        def run(count: int) -> Tensor:
            mask_BT = (torch.arange(z.shape[2]) < count).to(z).expand(len(z), -1)
            frames = objectives.given_frames(z, mask_BT)
            made = ddim(lambda x, t: net(torch.cat((x, frames), dim=1), t, batch["text"], batch.get("condition")),
                        noise, self.alphas, self.config.prediction, self.config.diffusion.spacing, CLIP_3)
            return torch.cat((z[:, :, :count], made[:, :, count:]), dim=2) / self.config.scale_factor

        made = {"from the text": (run(0), 0)}
        if z.shape[2] > 1:
            made["from the first frames"] = run(given), given
        return made

    def truth(self, batch: Encoded) -> Tensor:
        return batch["z"] / self.config.scale_factor

    def export(self, path: Path, net: nn.Module, metadata: dict[str, str]) -> None:
        checkpoint.save(path, net, self.config, metadata)

    def load(self, path: Path):
        model = checkpoint.load(read_checkpoint(path), network=self.kind)
        if self.encoders.vae is not None:
            checkpoint.preview_with(model, self.encoders.vae)
        return model


def names_of(encoders: Encoders) -> list[str]:
    """The names that a configuration may have for this text encoder. ValueError if there is none."""
    width, size = encoders.text("").shape[-1], getattr(encoders.clip, "trained_size", None)
    demos = [name for name, known in SIZES.items() if known == size] or SIZES  # of other models: any that fits
    names = [name for name, known in TEXT_ENCODERS.items() if known == width and (name in demos or name not in SIZES)]
    if not names:
        raise ValueError(f"The text encoder gives tokens {width} wide. A new video U-Net takes the CLIP of one of Load "
                         "DynamiCrafter's demos (32 wide) or CLIP-L (768 wide).")
    return names


def draw_masks(ends_B: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Which frames are given [B, T]: none, the first, the first 1 to 8, or the first and the last. Clips that return
    are always given both ends, since neither the text nor the past frames say that they will return."""
    batch, (names, shares) = len(ends_B), zip(*TASKS)
    task = torch.multinomial(torch.tensor(shares), batch, replacement=True, generator=generator)
    task[ends_B] = names.index("ends")
    past = torch.randint(1, frames // 2 + 1, (batch,), generator=generator)
    count = torch.where(task == names.index("past"), past, (task != names.index("text")).long())
    mask_BT = torch.arange(frames) < count[:, None]
    mask_BT[:, -1] |= task == names.index("ends")
    return mask_BT.float()


def network_class(settings: TrainConfig) -> type[VideoUNet]:
    return load_class(settings.network, VideoUNet) if settings.network else VideoUNet


def load_model(found: Checkpoint, settings: TrainConfig):
    return checkpoint.load(found, weight_dtype="fp32", network=network_class(settings))


def from_model(model, encoders: Encoders, settings: TrainConfig) -> VideoUNetTraining:
    """The network of a MODEL to fine-tune or, with from_scratch, a new one of the same size."""
    config = model.model.video_unet
    net = new_network(config.params, settings.seed, network_class(settings))
    if settings.from_scratch:
        config = replace(config, text_encoder=names_of(encoders)[0])
    else:
        net.load_state_dict(plain_weights(model))
    return VideoUNetTraining(net, config, encoders, settings)


def new(encoders: Encoders, settings: TrainConfig, dataset: Dataset) -> VideoUNetTraining:
    """A new network sized for the clips of a data set."""
    items = [dataset[i] for i in range(min(len(dataset), MEASURED))]
    latents = [clip_latent(item, encoders) for item in items]
    name, width, vae = names_of(encoders)[0], encoders.text("").shape[-1], encoders.vae
    edge = 1 if vae is None else vae.spacial_compression_encode()
    frames, height, width_px = latents[0].shape[1], *(side * edge for side in latents[0].shape[2:])
    if "video" in items[0]:
        frames, (height, width_px) = items[0]["video"].shape[1], items[0]["video"].shape[2:]
    if settings.model_channels % GROUPS:
        raise ValueError(f"model_channels is {settings.model_channels}: it must be a multiple of {GROUPS}.")
    levels = tuple(settings.channel_mult)
    params = VideoUNetParams(
        channels=latents[0].shape[0], model_channels=settings.model_channels, channel_mult=levels,
        num_res_blocks=settings.num_res_blocks, spatial_attention=(len(levels) - 1,),
        head_channels=next(size for size in (64, 48, 32, 24, 16) if settings.model_channels % size == 0),
        context_dim=width, additional_condition_dim=len(items[0].get("condition", ())))
    config = VideoUNetConfig(
        params=params, schedule=settings.schedule, prediction=settings.prediction, frames=frames, height=height,
        width=width_px, space="pixels" if vae is None else "latent",
        scale_factor=1.0 if vae is None else measured_scale(latents), spatial_factor=edge,
        temporal_factor=1 if vae is None else vae.temporal_compression_decode() or 1, text_encoder=name)
    return VideoUNetTraining(new_network(params, settings.seed, network_class(settings)), config, encoders, settings)


def measured_scale(latents: list[Tensor]) -> float:
    """Factor that scales latents to a standard deviation of 1, or less if needed to keep 99.9 % of the values within
    +-3, where x0 is clipped."""
    values = torch.cat([latent.flatten() for latent in latents]).abs()
    reach = values.sort().values[int(0.999 * (len(values) - 1))]
    return min(1 / values.square().mean().sqrt().item(), 3 / reach.item())
