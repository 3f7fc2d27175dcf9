"""What a VAE keeps of a data set, measured before training: a network cannot learn what its latents have lost."""
from __future__ import annotations

import logging
import math

from torch import Tensor
from torch.utils.data import Dataset

from .encoding import Encoders

log = logging.getLogger(__name__)

FRAMES = 8  # frames that are measured, each of another clip


def kept_psnr(dataset: Dataset, encoders: Encoders) -> float:
    """PSNR in dB of first frames of clips, spread over the data set, after encoding and decoding. Of finished latents,
    the decoded first one is compared with the reference image."""
    count = min(FRAMES, len(dataset))
    errors = [_error(dataset[i * len(dataset) // count], encoders) for i in range(count)]
    return -10 * math.log10(max(sum(errors) / count, 1e-10))


def _error(item: dict, encoders: Encoders) -> float:
    if "latent" in item:
        latent_CTHW, true_CHW = item["latent"][:, :1], item["reference"]
    else:
        latent_CTHW, true_CHW = encoders.latent(item["video"][:, :1]), item["video"][:, 0]
    made_HWC: Tensor = encoders.pixels(latent_CTHW[None])[0, 0]
    return (made_HWC - (true_CHW.movedim(0, -1) / 2 + 0.5).clamp(0, 1)).square().mean().item()


def check_vae(dataset: Dataset, encoders: Encoders, least: float) -> None:
    """Log what the VAE keeps. Raises ValueError if that is less than `least` dB; 0 allows anything."""
    if encoders.vae is None or not least:
        return
    psnr = kept_psnr(dataset, encoders)
    if psnr < least:
        raise ValueError(
            f"The VAE loses too much of these clips: decoded again, {min(FRAMES, len(dataset))} frames have a PSNR of "
            f"{psnr:.1f} dB, and {least:g} are needed, because training cannot bring back what the latents have lost. "
            "The demo's VAE knows drawn shapes only. Use the VAE of your model: a Stable Diffusion or DynamiCrafter "
            "checkpoint (encoders; the former brings CLIP-L, 768 wide, for the captions) or a VAE file (vae). Or train "
            "without a VAE (space pixels), or train a small VAE on these clips first (family vae). vae_psnr sets the "
            "bar, 0 for none.")
    log.info("The VAE keeps %.1f dB (PSNR) of the clips.", psnr)
