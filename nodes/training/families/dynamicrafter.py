"""Training DynamiCrafter (arXiv 2310.12190): full fine-tuning, or only its image projector and temporal layers."""
from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...common.attention import torch_attention
from ...common.demo import DYNAMICRAFTER_DEMOS
from ...common.files import Checkpoint, read_checkpoint
from ...ddim.schedule import make_alphas_cumprod, make_scale_arr
from ...dynamicrafter import checkpoint
from ...dynamicrafter.attention import SpatialTransformer, TemporalTransformer
from ...dynamicrafter.keys import TEXT, VAE, VISION
from ...dynamicrafter.resampler import Resampler
from ...dynamicrafter.unet import ResBlock, TemporalConv, UNetParams, VideoUNet
from .. import objectives
from ..config import TrainConfig
from ..encoding import Encoded, Encoders
from .base import NO_CLIP, Family, chosen, clip_latent, ddim, first_image, plain_weights

DEMOS = DYNAMICRAFTER_DEMOS
LAST_LAYERS = ("proj_out.", "conv4.3.", "out_layers.3.", "fps_embedding.2.")  # of branches, and of the network:
OUT = "out.2."
BOTH_ENDS = 1 / 3  # fraction of clips conditioned on their last frame too


class DynamiCrafterTraining(Family):
    blocks = (ResBlock, SpatialTransformer, TemporalTransformer)
    lora_targets = (".attn1.", ".attn2.")

    def __init__(self, net: VideoUNet, model, encoders: Encoders, settings: TrainConfig):
        self.net, self.encoders, self.emphasis = net, encoders, settings.emphasis
        self.timesteps = partial(objectives.draw_timesteps, law=settings.timesteps)
        self.source, self.diffusion = model.model.source, model.model.diffusion_params
        self.scale_factor = model.model.latent_format.scale_factor
        self.alphas, self.scale_arr = make_alphas_cumprod(self.diffusion), make_scale_arr(self.diffusion.base_scale)
        if encoders.vae is None or encoders.clip_vision is None:
            raise ValueError("DynamiCrafter learns from latents and image tokens: connect vae and clip_vision of Load "
                             "DynamiCrafter.")
        self.empty_1LC = self.empty_text()
        self.grey_1NW = encoders.image_tokens(torch.zeros(3, 64, 64))[None]  # mid-grey in -1..1, as in sampling
        for name, tokens, width in (("text encoder", self.empty_1LC, net.params.context_dim),
                                    ("vision tower", self.grey_1NW, net.params.resampler.embedding_dim)):
            if tokens.shape[-1] != width:
                raise ValueError(f"The {name} gives tokens {tokens.shape[-1]} wide, this model was trained with "
                                 f"{width}: connect the one of its own checkpoint.")
        if settings.train == "projector_temporal":
            net.requires_grad_(False)
            for module in net.modules():
                if isinstance(module, (Resampler, TemporalConv, TemporalTransformer)):
                    module.requires_grad_(True)

    def encode(self, item: dict) -> Encoded:
        return {"z": clip_latent(item, self.encoders) * self.scale_factor, "text": self.encoders.text(item["caption"]),
                "tokens": self.encoders.image_tokens(first_image(item))}

    def loss(self, net: nn.Module, batch: Encoded, generator: torch.Generator, dropout: float) -> Tensor:
        """Loss of a batch. Text and image are dropped independently."""
        z, count = batch["z"], len(batch["z"])
        text, tokens = (torch.where(chosen(count, dropout, generator, z.device)[:, None, None], empty.to(z), given)
                        for empty, given in ((self.empty_1LC, batch["text"]), (self.grey_1NW, batch["tokens"])))
        condition = objectives.concat_condition(z, chosen(count, BOTH_ENDS, generator, z.device))
        scale = torch.ones(1000) if self.scale_arr is None else self.scale_arr.float()
        return objectives.video_v_loss(net, z, condition, text, tokens, self.stride(z), self.alphas.float(), scale,
                                       generator, self.emphasis, self.diffusion.parameterization, self.timesteps)

    def stride(self, z: Tensor) -> Tensor:
        """The model's default speed (`fs`) for every clip [B]: data sets do not specify one."""
        return torch.full((len(z),), self.net.params.default_fs, device=z.device)

    def sample(self, net: nn.Module, batch: Encoded, seed: int) -> dict[str, tuple[Tensor, int]]:
        z = batch["z"]
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)
        condition = objectives.concat_condition(z, torch.zeros(len(z), dtype=torch.bool, device=z.device))
        made = ddim(lambda x, t: net(torch.cat((x, condition), dim=1), t, batch["text"], batch["tokens"],
                                     self.stride(z)),
                    noise, self.alphas, self.diffusion.parameterization, self.diffusion.spacing, NO_CLIP,
                    self.scale_arr)
        return {"from the first frame": (made / self.scale_factor, 1)}

    def truth(self, batch: Encoded) -> Tensor:
        return batch["z"] / self.scale_factor

    def export(self, path: Path, net: nn.Module, metadata: dict[str, str]) -> None:
        """The checkpoint that the model was loaded from, with the new weights, in the file's original dtype."""
        self._save(path, net, metadata, left_out=("model_ema.",))

    def export_weights(self, path: Path, net: nn.Module, metadata: dict[str, str]) -> None:
        """The same without VAE and towers, for a loader that gets them from elsewhere."""
        self._save(path, net, metadata, left_out=("model_ema.", VAE, TEXT.split(".")[0], VISION.split(".")[0]))

    def _save(self, path: Path, net: nn.Module, metadata: dict[str, str], left_out: tuple[str, ...]) -> None:
        source = read_checkpoint(self.source.path)
        file_key = checkpoint.checkpoint_keys(source.tensors)
        tensors = {key: value for key, value in source.tensors.items() if not key.startswith(left_out)}
        for key, value in net.state_dict().items():
            tensors[file_key(key)] = value.detach().to("cpu", source.tensors[file_key(key)].dtype)
        save_file({key: value.contiguous() for key, value in tensors.items()}, path,
                  metadata={"format": "pt", **source.metadata, **metadata})

    def load(self, path: Path):
        return checkpoint.load(read_checkpoint(path), self.source.variant, yaml_path=self.source.yaml_path).model


def load_model(found: Checkpoint, settings: TrainConfig):
    return checkpoint.load(found, weight_dtype="fp32").model


def from_model(model, encoders: Encoders, settings: TrainConfig) -> DynamiCrafterTraining:
    """The network of a MODEL to fine-tune or, with from_scratch, a new one of the same size."""
    net = fresh_network(model.model.params, settings.seed)
    if not settings.from_scratch:
        net.load_state_dict(plain_weights(model))
    return DynamiCrafterTraining(net, model, encoders, settings)


def fresh_network(params: UNetParams, seed: int) -> VideoUNet:
    """An untrained network with every branch initialised as the identity and a zero output."""
    torch.manual_seed(seed)
    net = VideoUNet(params, nn, torch_attention)
    nn.init.normal_(net.image_proj_model.latents, std=params.resampler.dim ** -0.5)
    for name, parameter in net.named_parameters():
        inside = "image_proj_model" not in name and any(part in name for part in LAST_LAYERS)
        if inside or name.startswith(OUT):
            nn.init.zeros_(parameter)
    return net
