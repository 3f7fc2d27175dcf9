"""Training objectives: one loss function per network, pure except for the generator it draws from.

Tensor names end in their layout: B batch, T frames, C channels, H height, W width, L text tokens, N vision tokens.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAWS = ("uniform", "logit_normal")  # of `draw_levels`
Timesteps = Callable[[int, torch.Generator], Tensor]


def autoencoder_loss(vae: nn.Module, images_BCHW: Tensor, generator: torch.Generator, kl_weight: float,
                     emphasis: float) -> Tensor:
    """Reconstruction loss of images in [-1, 1] from a sampled posterior, plus its KL divergence from N(0, 1).

    `vae` has the layout of the latent-diffusion AutoencoderKL (arXiv 2112.10752): encoder, quant_conv,
    post_quant_conv, decoder. Pixels that differ from the background (the corner's colour), and 3 pixels around them,
    are weighted by `emphasis`: otherwise omitting a small shape is cheaper than learning it, and its outline blurs.
    """
    mean, logvar = vae.quant_conv(vae.encoder(images_BCHW)).chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    noise = torch.randn(mean.shape, generator=generator)
    decoded = vae.decoder(vae.post_quant_conv(mean + (0.5 * logvar).exp() * noise))
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    shape_B1HW = (images_BCHW - images_BCHW[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05
    weight = 1 + (emphasis - 1) * F.max_pool2d(shape_B1HW.float(), 7, stride=1, padding=3)
    return (weight * (decoded - images_BCHW).square()).mean() + kl_weight * divergence


def contrastive_loss(clip: nn.Module, images_BCHW: Tensor, tokens_BL: Tensor) -> Tensor:
    """Symmetric contrastive loss of an open_clip model (CLIP, arXiv 2103.00020)."""
    image, text, scale = clip(images_BCHW, tokens_BL)
    logits, target = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def attribute_loss(scores: Sequence[Tensor], said_BA: Tensor) -> Tensor:
    """Cross-entropy of A attributes, each with its own scores [B, classes] and a column of target classes."""
    return sum(F.cross_entropy(score, said) for score, said in zip(scores, said_BA.T))


def draw_levels(shape: Sequence[int], law: str, generator: torch.Generator) -> Tensor:
    """Noise levels in 0..1 of `shape`: "uniform" (arXiv 2006.11239), or "logit_normal" with mean 0 and deviation 1,
    which favours the middle (arXiv 2403.03206)."""
    if law == "uniform":
        return torch.rand(tuple(shape), generator=generator)
    if law == "logit_normal":
        return torch.randn(tuple(shape), generator=generator).sigmoid()
    raise ValueError(f"The law of timesteps {law!r} is unknown: choose one of {', '.join(LAWS)}.")


def draw_timesteps(batch: int, generator: torch.Generator, law: str = "uniform") -> Tensor:
    """Timesteps 0..999 [B]."""
    return (1000 * draw_levels((batch,), law, generator)).long().clamp(max=999)


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels of flow matching moved towards 1 by `shift`, as a sampler with this shift visits them (arXiv
    2403.03206, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def concat_condition(z_BCTHW: Tensor, ends_B: Tensor) -> Tensor:
    """DynamiCrafter's condition frames: the first frame at every position or, where `ends_B` is true, the first and
    last frames in their places with zeros between."""
    repeated = z_BCTHW[:, :, :1].expand_as(z_BCTHW)
    ends = torch.zeros_like(z_BCTHW)
    ends[:, :, 0], ends[:, :, -1] = z_BCTHW[:, :, 0], z_BCTHW[:, :, -1]
    return torch.where(ends_B[:, None, None, None, None], ends, repeated)


def video_v_loss(unet: nn.Module, z_BCTHW: Tensor, condition_BCTHW: Tensor, text_BLC: Tensor, image_BNW: Tensor,
                 frame_stride_B: Tensor, alphas_cumprod: Tensor, scale_arr: Tensor, generator: torch.Generator,
                 emphasis: float = 1.0, prediction: str = "v", timesteps: Timesteps = draw_timesteps) -> Tensor:
    """Loss of a DynamiCrafter network that predicts "v" (arXiv 2202.00512) or "eps", with its dynamic rescale of x0
    (arXiv 2310.12190; a `scale_arr` of ones disables it). `timesteps(batch, generator)` draws them, 0..999 [B].

    Latent pixels that change over time are weighted by `emphasis`: with a small shape on a plain background, most of
    the frame carries no information about the motion.
    """
    batch = len(z_BCTHW)
    t = timesteps(batch, generator)
    noise = torch.randn(z_BCTHW.shape, generator=generator).to(z_BCTHW)
    scale, alpha = (table[t].to(z_BCTHW).view(-1, 1, 1, 1, 1) for table in (scale_arr, alphas_cumprod))
    x0, signal, sigma = z_BCTHW * scale, alpha.sqrt(), (1 - alpha).sqrt()
    noisy = signal * x0 + sigma * noise
    target = noise if prediction == "eps" else signal * noise - sigma * x0
    x_BCTHW = torch.cat((noisy, condition_BCTHW), dim=1)
    predicted = unet(x_BCTHW, t.to(z_BCTHW.device), text_BLC, image_BNW, frame_stride_B)
    change_B1HW = (z_BCTHW.amax(2) - z_BCTHW.amin(2)).amax(1, keepdim=True)
    weight_B11HW = 1 + (emphasis - 1) * (change_B1HW > 0.5)[:, :, None]
    return (weight_B11HW * (predicted - target).square()).mean()


def given_frames(z_BCTHW: Tensor, mask_BT: Tensor) -> Tensor:
    """Extra input channels of the video U-Net [B, C + 1, T, H, W]: frames with mask 1, else zeros, and the mask."""
    mask_B1THW = mask_BT[:, None, :, None, None].to(z_BCTHW).expand(-1, 1, -1, *z_BCTHW.shape[3:])
    return torch.cat((z_BCTHW * mask_B1THW, mask_B1THW), dim=1)


def video_unet_loss(net: nn.Module, z_BCTHW: Tensor, mask_BT: Tensor, text_BLC: Tensor, alphas_cumprod: Tensor,
                    prediction: str, generator: torch.Generator, emphasis: float = 1.0,
                    additional_BD: Tensor | None = None, timesteps: Timesteps = draw_timesteps) -> Tensor:
    """Loss of the video U-Net, predicting "eps" (arXiv 2006.11239) or "v" (arXiv 2202.00512), on clips whose frames
    with mask 1 are given. `timesteps(batch, generator)` draws them, 0..999 [B], on the generator's device.

    Latent pixels that change over time are weighted by `emphasis`, as in `video_v_loss`.
    """
    if prediction not in ("eps", "v"):
        raise ValueError(f"Prediction {prediction!r} is unknown: choose eps or v.")
    t = timesteps(len(z_BCTHW), generator)
    noise = torch.randn(z_BCTHW.shape, generator=generator).to(z_BCTHW)
    alpha = alphas_cumprod[t].to(z_BCTHW).view(-1, 1, 1, 1, 1)
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    noisy = signal * z_BCTHW + sigma * noise
    target = noise if prediction == "eps" else signal * noise - sigma * z_BCTHW
    x_BCTHW = torch.cat((noisy, given_frames(z_BCTHW, mask_BT)), dim=1)
    predicted = net(x_BCTHW, t.to(z_BCTHW.device), text_BLC, additional_BD)
    change_B1HW = (z_BCTHW.amax(2) - z_BCTHW.amin(2)).amax(1, keepdim=True)
    weight_B11HW = 1 + (emphasis - 1) * (change_B1HW > 0.5 * z_BCTHW.std())[:, :, None]
    return (weight_B11HW * (predicted - target).square()).mean()


def teacher_mask(blocks: Sequence[int], first: int) -> Tensor:
    """Attention mask over frames [F, F] for a pass over the clean frames of all blocks but the last, followed by the
    noisy frames of the blocks from `first` on. Clean frames attend to clean blocks up to their own; noisy frames attend
    to their own block and the clean frames before it."""
    index = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks))
    clean, noisy = index[index < len(blocks) - 1], index[index >= first]
    of_clean = torch.cat((clean[:, None] >= clean[None], clean.new_zeros(len(clean), len(noisy)).bool()), dim=1)
    of_noisy = torch.cat((noisy[:, None] > clean[None], noisy[:, None] == noisy[None]), dim=1)
    return torch.cat((of_clean, of_noisy))


def causal_flow_loss(net: nn.Module, z_BCFHW: Tensor, context_BCFHW: Tensor, y_BYFHW: Tensor, keys,
                     blocks: Sequence[int], first: int, sigma_BN: Tensor, noise_BCFHW: Tensor,
                     emphasis: float = 1.0) -> Tensor:
    """Flow-matching loss of a causal Wan network on all blocks from `first` on, in one pass (teacher forcing,
    arXiv 2412.07772): every block is denoised given the finished frames `context_BCFHW` of the blocks before it.

    The context is the clip itself, or what the network generated for it (arXiv 2506.08009); the target is the clip in
    both cases. sigma_BN: noise level of each block. keys: from `net.project_context`. Latent pixels that change over
    time are weighted by `emphasis`, as in `video_v_loss`.
    """
    known, start = sum(blocks[:-1]), sum(blocks[:first])
    sigma_BF = sigma_BN.repeat_interleave(torch.tensor(blocks, device=sigma_BN.device), dim=1)[:, start:]
    sigma = sigma_BF[:, None, :, None, None]
    clean, noise = z_BCFHW[:, :, start:], noise_BCFHW[:, :, start:]
    noisy = torch.cat(((1 - sigma) * clean + sigma * noise, y_BYFHW[:, :, start:]), dim=1)
    finished = torch.cat((context_BCFHW[:, :, :known], y_BYFHW[:, :, :known]), dim=1)
    t_BF = torch.cat((sigma_BF.new_zeros(len(sigma_BF), known), 1000 * sigma_BF), dim=1)
    frame_ids = [*range(known), *range(start, sum(blocks))]
    mask_FF = teacher_mask(blocks, first)
    flow = net(torch.cat((finished, noisy), dim=2), t_BF, keys, frame_ids, mask_FF=mask_FF)
    change_B1HW = (z_BCFHW.amax(2) - z_BCFHW.amin(2)).amax(1, keepdim=True)
    weight_B11HW = 1 + (emphasis - 1) * (change_B1HW > 0.5)[:, :, None]
    return (weight_B11HW * (flow[:, :, known:] - (noise - clean)).square()).mean()
