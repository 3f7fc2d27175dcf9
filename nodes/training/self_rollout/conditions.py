"""What the three networks know of a video: prompts and, for image to video, the start image in one of its two forms.

Image-to-video networks take the vision tower's tokens (clip_fea) and y, mask and image latent for every latent frame.
Text-to-video networks can take the image as the first latent frame: clean, at timestep 0.
Layouts: B videos, C channels, F latent frames, N tokens.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...causal_wan.base import MASK_CHANNELS
from ...causal_wan.model import WanParams


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions of a batch of videos."""

    texts: tuple[Tensor, ...]     # [B, N, text_dim] of each prompt, in order of time
    negative_BND: Tensor          # the prompt that guidance leads away from
    image_BNW: Tensor | None      # clip_fea [B, 257, 1280] for CLIP ViT-H
    y_BYFHW: Tensor | None        # 4 mask channels (1: given), then the image latent
    first_BC1HW: Tensor | None    # the clean first latent, for text-to-video networks alone

    def check(self, params: WanParams) -> None:
        """Raise ValueError for a condition that the network needs and does not get, or cannot take."""
        batch = len(self.negative_BND)
        wrong = [list(text.shape) for text in self.texts if text.ndim != 3 or len(text) != batch]
        if wrong:
            raise ValueError(f"A prompt has shape {wrong[0]} in a batch of {batch}: give [{batch}, tokens, width].")
        if not params.i2v:
            if self.image_BNW is not None or self.y_BYFHW is not None:
                raise ValueError("This network is text to video and takes no clip_fea and no y: give the image as the "
                                 "first latent (first_latent), or train an image-to-video checkpoint.")
            return
        if self.first_BC1HW is not None:
            raise ValueError("This network is image to video and sees the image through y: leave first_latent away.")
        if self.image_BNW is None or self.y_BYFHW is None:
            raise ValueError("This image-to-video network needs clip_fea and y of the start image: use a data set with "
                             "images (clips, or shards with reference images), not prompts alone.")
        if self.image_BNW.ndim != 3 or len(self.image_BNW) != batch:
            raise ValueError(f"clip_fea has shape {list(self.image_BNW.shape)}: it must be [{batch}, tokens, "
                             f"{params.clip_dim}], with its batch dimension even for a single video.")
        if self.y_BYFHW.ndim != 5 or self.y_BYFHW.shape[:2] != (batch, params.in_dim - params.out_dim):
            raise ValueError(f"y has shape {list(self.y_BYFHW.shape)}: it must be [{batch}, "
                             f"{params.in_dim - params.out_dim}, latent frames, height, width].")

    def lengthened(self, frames: int) -> Conditions:
        """For a video of `frames` latent frames: y's last frame (grey, mask 0) goes on."""
        if self.y_BYFHW is None:
            return self
        missing = max(0, frames - self.y_BYFHW.shape[2])
        y_BYFHW = torch.cat((self.y_BYFHW, self.y_BYFHW[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
        return Conditions(**{**vars(self), "y_BYFHW": y_BYFHW[:, :, :frames]})

    def scored(self, start: int, count: int, prompt: int, anchor_BC1HW: Tensor) -> Conditions:
        """What the scores know of the frames start .. start + count - 1, which are a video of their own to them.

        At the start of the video that is the whole of it. Later frames begin with the frame `anchor`, which was
        finished before: it takes the start image's place.
        """
        given, y_BYFHW, first_BC1HW = {}, self.y_BYFHW, self.first_BC1HW
        if y_BYFHW is not None:
            y_BYFHW = y_BYFHW[:, :, start:start + count]
            if start:
                y_BYFHW = y_BYFHW.clone()
                y_BYFHW[:, :MASK_CHANNELS, 0], y_BYFHW[:, MASK_CHANNELS:, 0] = 1, anchor_BC1HW[:, :, 0]
        if first_BC1HW is not None and start:
            first_BC1HW = anchor_BC1HW
        given.update(texts=(self.texts[prompt],), y_BYFHW=y_BYFHW, first_BC1HW=first_BC1HW)
        return Conditions(**{**vars(self), **given})
