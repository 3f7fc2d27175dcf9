"""Causal Wan in training on its own rollouts: what its data set is encoded to, its three networks, and its samples."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...causal_wan.blocks import split_frames
from ...causal_wan.conditioning import latent_frames
from ...causal_wan.model import CausalWan
from ...common.attention import torch_attention
from ...common.images import check_size
from ..config import TrainConfig
from ..encoding import Encoded, Encoders
from ..families.base import plain_weights
from ..families.causal_wan import CausalWanTraining, fresh_network
from ..families.registry import adapt
from ..parallel import HALVES
from .conditions import Conditions
from .method import SelfRollout


class SelfRolloutFamily(CausalWanTraining):
    """`teacher` and `fake` are MODELs; the fake score begins with a copy of the teacher if `fake` is None."""

    def __init__(self, student, teacher, fake, encoders: Encoders, settings: TrainConfig):
        net = fresh_network(student.model.wan_params, settings.seed)
        net.load_state_dict(plain_weights(student))
        super().__init__(net, student, encoders, settings)
        self.settings = settings
        precise = HALVES.get(settings.mixed_precision, torch.float32)
        for name, model in (("teacher", teacher), ("fake score", fake)):
            self._check_model(name, model)
        self.method = SelfRollout(student=net, real=score_network(teacher, precise),
                                  fake=score_network(fake or teacher, torch.float32), settings=settings,
                                  block=self.block, still=self.still if self._time_ratio() > 1 else None)
        if settings.train == "lora":
            adapt(net, self, settings)
        if settings.fake_lora:
            adapt(self.method.fake, self, settings)
        self.negative_1LC = encoders.text(settings.negative_prompt)[None]

    def _check_model(self, name: str, model: Any) -> None:
        """Raise ValueError for a MODEL that is not of the student's kind."""
        if model is None:
            if name == "teacher":
                raise ValueError("self_rollout needs a teacher: a bidirectional Wan that makes good videos in many "
                                 "steps (for Wan 2.1 1.3B students: Wan 2.1 14B). Give one.")
            return
        kind = type(model.model).__name__
        if kind != "CausalWanModel":
            raise ValueError(f"The {name} is a {kind}: load it with Load Causal Wan, which takes bidirectional Wan 2.1 "
                             "too.")
        mine, theirs = (getattr(each, "scale_factor", 1.0) for each in (self.latent_format, model.model.latent_format))
        if mine != theirs:
            raise ValueError(f"The {name} scales its latents by {theirs}, the student by {mine}: give one that was "
                             "trained on the same latents.")

    def _time_ratio(self) -> int:
        """Video frames of a latent frame, for all but the first."""
        return self.encoders.vae.temporal_compression_decode() or 1

    def encode(self, item: dict) -> Encoded:
        """As in other trainings; of a prompt alone its text, and the shape [C, T, h, w] of the video to make."""
        if "frames" not in item:
            return super().encode(item)
        if self.net.params.i2v or self.settings.first_latent:
            raise ValueError("Image to video learns from start images, and this data set has prompts alone: give clips "
                             "(videos/ and captions/), or shards of them.")
        height, width = item["size"]
        check_size(width, height, self.side_multiple)
        frames = latent_frames(item["frames"], self._time_ratio(), "num_frames")
        self._check_length(frames)
        edge = self.encoders.vae.spacial_compression_encode()
        shape = torch.tensor([self.net.params.out_dim, frames, height // edge, width // edge])
        return {"text": self.encoders.text(item["caption"]), "shape": shape}

    def _check_length(self, frames: int) -> None:
        split_frames(frames, self.block, self.settings.independent_first, short_last=False)

    def shape(self, batch: Encoded) -> tuple[int, ...]:
        """[B, C, F, H, W] of the videos to make."""
        return tuple(batch["z"].shape) if "z" in batch else (len(batch["text"]), *batch["shape"][0].tolist())

    def conditions(self, batch: Encoded, later: Encoded | None = None) -> Conditions:
        """Conditions of a batch; `later` has the prompts after a change."""
        texts = tuple(each["text"] for each in (batch, later) if each is not None)
        return Conditions(texts=texts, negative_BND=self.negative_1LC.to(texts[0]).expand_as(texts[0]),
                          image_BNW=batch.get("tokens"), y_BYFHW=batch.get("y"),
                          first_BC1HW=batch["z"][:, :, :1] if self.settings.first_latent else None)

    @torch.no_grad()
    def still(self, latent_BCFHW: Tensor) -> Tensor:
        """The last video frame of these latents as the first latent of a video [B, C, 1, H, W]."""
        frames_BTHWC = self.encoders.pixels(self.latent_format.process_out(latent_BCFHW))
        clips = [2 * frames_THWC[-1:].permute(3, 0, 1, 2) - 1 for frames_THWC in frames_BTHWC]
        return torch.stack([self._scaled(self.encoders.latent(clip_C1HW)) for clip_C1HW in clips]).to(latent_BCFHW)

    @torch.no_grad()
    def sample(self, net: nn.Module, batch: Encoded, seed: int) -> dict[str, tuple[Tensor, int]]:
        """Rollouts to the end of the schedule."""
        method = replace(self.method, student=net)
        shape = self.shape(batch)
        rollout = method.begin(self.conditions(batch), shape, 0, torch.Generator().manual_seed(seed))
        rollout.exit = len(method.steps) - 1
        given = int("y" in batch or self.settings.first_latent)
        name = "from the first frame" if given else "from the text"
        return {name: (self.latent_format.process_out(rollout.take(shape[2])), given)}


def score_network(model, dtype: torch.dtype) -> CausalWan:
    """The network of a MODEL, its LoRAs merged, in plain PyTorch."""
    with torch.device("meta"):
        net = CausalWan(model.model.wan_params, nn, torch_attention)
    net.load_state_dict(plain_weights(model, dtype), assign=True)
    return net
