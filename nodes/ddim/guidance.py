"""Classifier-free guidance on model outputs (v or eps), all tensors [B, C, ...]."""
import torch


def cfg(uncond: torch.Tensor, cond: torch.Tensor, scale: float) -> torch.Tensor:
    """Guidance by one condition (arXiv 2207.12598): scale 1 returns cond."""
    return uncond + scale * (cond - uncond)


def cfg_image_text(uncond: torch.Tensor, image: torch.Tensor, cond: torch.Tensor, image_scale: float,
                   scale: float) -> torch.Tensor:
    """Separate guidance by image and by text (InstructPix2Pix, arXiv 2211.09800).

    uncond: neither; image: the image without the text; cond: both.
    """
    return uncond + image_scale * (image - uncond) + scale * (cond - image)


def rescale(guided: torch.Tensor, cond: torch.Tensor, amount: float) -> torch.Tensor:
    """Rescale the standard deviation of the guided output to that of cond (arXiv 2305.08891, section 3.4).

    One standard deviation per sample, over channels, frames, height and width together: one per frame would make the
    brightness of a video flicker. amount 0: off, 1: fully.
    """
    if amount == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    std_cond, std_guided = cond.std(dims, keepdim=True), guided.std(dims, keepdim=True)
    factor = torch.where(std_guided > 0, std_cond / std_guided, 1.0)
    return guided * (amount * factor + (1 - amount))
