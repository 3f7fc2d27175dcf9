"""Training Causal Wan: flow matching, every block conditioned on the clean blocks before it (arXiv 2412.07772)."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...causal_wan import checkpoint
from ...causal_wan.attention import WanBlock
from ...causal_wan.base import MASK_CHANNELS
from ...causal_wan.blocks import BlockLoop, Plan
from ...causal_wan.cache import KVCache
from ...causal_wan.model import CausalWan, WanParams
from ...causal_wan.noise import seeded_noise
from ...causal_wan.schedule import make_steps
from ...common.attention import torch_attention
from ...common.demo import CAUSAL_WAN
from ...common.files import Checkpoint, read_checkpoint
from .. import objectives
from ..config import TrainConfig
from ..encoding import Encoded, Encoders, as_node
from .base import Family, chosen, clip_latent, first_image, plain_weights

DEMOS = {"demo": CAUSAL_WAN}
STEPS = (1000, 750, 500, 250)   # timesteps of a sample
BLOCK, DEMO_BLOCK = 3, 4        # of published models (16 latent channels) and of the demo (4)


class CausalWanTraining(Family):
    folder, blocks = "diffusion_models", (WanBlock,)
    lora_targets = ("self_attn.", "cross_attn.", "ffn.")

    def __init__(self, net: CausalWan, model, encoders: Encoders, settings: TrainConfig):
        self.net, self.encoders = net, encoders
        self.block = settings.block or (BLOCK if net.params.out_dim == 16 else DEMO_BLOCK)
        self.settled = {"block": self.block}
        self.law, self.shift, self.emphasis = settings.timesteps, settings.shift, settings.emphasis
        self.latent_format, self.encoders_of = model.model.latent_format, model.model.encoders_of
        if encoders.vae is None or net.params.i2v and encoders.clip_vision is None:
            raise ValueError("Causal Wan learns from latents, and its image-to-video models from image tokens: connect "
                             f"vae{' and clip_vision' if net.params.i2v else ''}.")
        self.empty_1LC = self.empty_text()
        if self.empty_1LC.shape[-1] != net.params.text_dim:
            raise ValueError(f"The text encoder gives tokens {self.empty_1LC.shape[-1]} wide, this model was trained "
                             f"with {net.params.text_dim}: connect the one that belongs to it.")

    @property
    def side_multiple(self) -> int:
        """The network uses patches of 2x2 latent pixels."""
        return 2 * super().side_multiple

    def encode(self, item: dict) -> Encoded:
        """Tensors of one clip; for image-to-video models also y and the image tokens of the first frame."""
        latent_CTHW = clip_latent(item, self.encoders)
        self._check_length(latent_CTHW.shape[1])
        encoded = {"z": self._scaled(latent_CTHW), "text": self.encoders.text(item["caption"])}
        if self.net.params.i2v:
            image_CHW = first_image(item)
            pixels_1HWC = (image_CHW.movedim(0, -1)[None] + 1) / 2
            encoded["tokens"] = as_node(
                lambda: self.encoders.clip_vision.encode_image(pixels_1HWC).penultimate_hidden_states)[0]
            encoded["y"] = self._image_condition(image_CHW, latent_CTHW.shape[1])
        return encoded

    def _check_length(self, latent_frames: int) -> None:
        """Raise ValueError for clips that are not whole blocks."""
        whole, rest = divmod(latent_frames, self.block)
        if rest:
            ratio = self.encoders.vae.temporal_compression_decode() or 1
            frames = [(n * self.block - 1) * ratio + 1 for n in (whole, whole + 1) if n]
            fitting = [n for n in range(1, latent_frames + 1) if latent_frames % n == 0]
            raise ValueError(f"The clips have {latent_frames} latent frames, which do not split into blocks of "
                             f"{self.block}. Give the data set {' or '.join(map(str, frames))} frames, or set block to "
                             f"one of {', '.join(map(str, fitting))}.")

    def _scaled(self, latent_CTHW: Tensor) -> Tensor:
        return self.latent_format.process_in(latent_CTHW[None])[0]

    def _image_condition(self, image_CHW: Tensor, latent_frames: int) -> Tensor:
        """y [4 + C, T, h, w] as in Causal Wan Image to Video: the image, then grey frames; mask 1 where given."""
        frames = (latent_frames - 1) * (self.encoders.vae.temporal_compression_decode() or 1) + 1
        clip_CTHW = torch.zeros(3, frames, *image_CHW.shape[1:])  # 0 is grey in -1..1
        clip_CTHW[:, 0] = image_CHW
        latent_CTHW = self._scaled(self.encoders.latent(clip_CTHW))
        mask = torch.zeros(MASK_CHANNELS, *latent_CTHW.shape[1:])
        mask[:, 0] = 1
        return torch.cat((mask, latent_CTHW))

    def loss(self, net: nn.Module, batch: Encoded, generator: torch.Generator, dropout: float) -> Tensor:
        z, text = batch["z"], batch["text"]
        blocks = (self.block,) * (z.shape[2] // self.block)
        dropped = chosen(len(z), dropout, generator, z.device)[:, None, None]
        levels = objectives.draw_levels((len(z), len(blocks)), self.law, generator)
        sigma = objectives.shift_sigmas(levels, self.shift).to(z)
        noise = torch.randn(z.shape, generator=generator).to(z)
        keys = net.project_context(torch.where(dropped, self.empty_1LC.to(text), text), batch.get("tokens"))
        return objectives.causal_flow_loss(net, z, z, self._y(batch), keys, blocks, 0, sigma, noise, self.emphasis)

    def _y(self, batch: Encoded) -> Tensor:
        """The image condition; zero channels for text-to-video models."""
        return batch["y"] if "y" in batch else batch["z"][:, :0]

    @torch.no_grad()
    def sample(self, net: nn.Module, batch: Encoded, seed: int) -> dict[str, tuple[Tensor, int]]:
        z = batch["z"]
        count, channels, frames, height, width = z.shape
        steps = make_steps(STEPS, self.shift, warp=True)
        plan = Plan(blocks=(self.block,) * (frames // self.block), steps=steps, first_steps=steps, context_noise=0,
                    window=-1, sink=0, endless=False, switches=(), global_sink=False, cfg=1)
        cache = KVCache(plan.layout(net.params, height, width), count, torch.float32, z.device)
        draw = seeded_noise(seed, count, channels, height, width)
        loop = BlockLoop(plan=plan, evaluate=net, caches=[cache], y_BYFHW=self._y(batch),
                         project=lambda _: [net.project_context(batch["text"], batch.get("tokens"))],
                         noise=lambda *place: draw(*place).to(z), on_step=lambda *_: None)
        made = torch.cat([block.latent_BCFHW for block in loop.run(None, None, None)], dim=2)
        name, given = ("from the first frame", 1) if "y" in batch else ("from the text", 0)
        return {name: (self.latent_format.process_out(made), given)}

    def truth(self, batch: Encoded) -> Tensor | None:
        return self.latent_format.process_out(batch["z"]) if "z" in batch else None

    def export(self, path: Path, net: CausalWan, metadata: dict[str, str]) -> None:
        """Native Wan keys in fp16; the header's `config` holds what cannot be inferred from shapes."""
        config = {"num_heads": net.params.num_heads, "scale_factor": getattr(self.latent_format, "scale_factor", 1.0),
                  "transformer": {"causal_ar": True}} | ({"encoders": self.encoders_of} if self.encoders_of else {})
        weights = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in net.state_dict().items()}
        save_file(weights, path, metadata={"format": "pt", "config": json.dumps(config), **metadata})

    def load(self, path: Path):
        return checkpoint.load(read_checkpoint(path))


def load_model(found: Checkpoint, settings: TrainConfig):
    return checkpoint.load(found, weight_dtype="fp32")


def from_model(model, encoders: Encoders, settings: TrainConfig) -> CausalWanTraining:
    """The network of a MODEL to fine-tune or, with from_scratch, a new one of the same size."""
    net = fresh_network(model.model.wan_params, settings.seed)
    if not settings.from_scratch:
        net.load_state_dict(plain_weights(model))
    return CausalWanTraining(net, model, encoders, settings)


def fresh_network(params: WanParams, seed: int) -> CausalWan:
    """An untrained network whose initial output is near zero."""
    torch.manual_seed(seed)
    net = CausalWan(params, nn, torch_attention)
    nn.init.normal_(net.head.head.weight, std=1e-3)
    nn.init.zeros_(net.head.head.bias)
    return net
