"""Rates a model, its inputs and a short sampling run as good, doubtful or bad, with figures and suggestions.

The verdict on the sampling run itself is `SamplingReport.verdict`. Typical values: latents about +-2.5, decoded
pictures in 0..1 with a mean of 0.3 to 0.7 and a standard deviation of 0.1 to 0.3. A reference picture widens these
limits.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..ddim.report import SamplingReport
from .probe import finite

LEVELS = ("good", "doubtful", "bad")
MEAN, STD = (0.3, 0.7), (0.1, 0.3)            # of decoded pictures
FLAT = 0.01                                   # standard deviation below which a picture counts as a single colour
RMS_USUAL, RMS_BAD = (0.3, 2.5), 5.0          # of latents after the model's scale factor; 1 in training
RMS_TOKENS = 100.0
RMS_WEIGHT = 10.0
LOST_USUAL, LOST_BAD = 0.25, 0.8              # fraction of a picture's variance lost by encoding and decoding
GAIN = 3.0                                    # minimum change in dB for clipping to be reported
NAMED = 4                                     # layers named in a sentence


@dataclass(frozen=True)
class Finding:
    """The result of one check. text: the figures and, unless good, what to try."""
    topic: str
    level: str
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and the report of the sampling run (None if bad inputs prevented it)."""
    findings: tuple[Finding, ...]
    report: SamplingReport | None

    @property
    def level(self) -> str:
        """The worst level among the findings."""
        return max((finding.level for finding in self.findings), key=LEVELS.index)

    def text(self) -> str:
        """Verdict, one line per finding, then the table of the sampling run."""
        lines = [f"{self.level}: {self.headline()}", ""]
        lines += [f"{finding.level:8s} {finding.topic}: {finding.text}" for finding in self.findings]
        return "\n".join(lines + (["", self.report.text()] if self.report else []))

    def headline(self) -> str:
        """The checks by level, so that the verdict has its reason."""
        parts = []
        for level in LEVELS[:0:-1]:
            topics = [finding.topic for finding in self.findings if finding.level == level]
            parts += [f"{', '.join(topics)} {'is' if len(topics) == 1 else 'are'} {level}"] if topics else []
        count = sum(finding.level == "good" for finding in self.findings)
        return "; ".join([*parts, f"{'the other' if parts else 'all'} {count} checks are good"])

    def data(self) -> dict:
        """The same as plain values, for JSON."""
        steps = [] if self.report is None else [
            dict(timestep=t, **dict(zip(self.report.columns, row)))
            for t, *row in zip(self.report.timesteps, *self.report.columns.values())]
        return {"verdict": self.level, "text": self.text(), "findings": [asdict(f) for f in self.findings],
                "steps": steps, "settings": self.report.settings if self.report else "", "values":
                self.report.values if self.report else 0}


def judge_latent(topic: str, latent: Tensor) -> Finding:
    """A latent in the model's own scale (any shape): finite and of about the training magnitude, ignoring zeros."""
    if not finite([latent]):
        return _not_finite(topic, latent)
    filled = latent[latent != 0]
    if not len(filled):
        return Finding(topic, "good", "empty: sampling starts from noise.")
    rms, reach = filled.square().mean().sqrt().item(), filled.abs().max().item()
    found = f"root mean square {rms:.2f} (1 is usual), range +-{reach:.1f}"
    if rms > RMS_USUAL[1]:
        return Finding(topic, "bad" if rms > RMS_BAD else "doubtful",
                       f"{found}: too large. The VAE's scale factor seems to be missing, or it is from another VAE: "
                       "encode the picture with the model's own VAE, or clip x0 (static, 3) to reduce the damage.")
    if rms < RMS_USUAL[0]:
        return Finding(topic, "doubtful", f"{found}: too small. The scale factor seems to be applied twice: encode the "
                                          "picture with the model's own VAE, without further scaling.")
    return Finding(topic, "good", f"{found}.")


def judge_tokens(topic: str, tokens: Tensor) -> Finding:
    """Text or image tokens: finite, not all zero and not huge."""
    if not finite([tokens]):
        return _not_finite(topic, tokens)
    rms = tokens.float().square().mean().sqrt().item()
    found = f"{' x '.join(map(str, tokens.shape))}, root mean square {rms:.2f}"
    if rms == 0 or rms > RMS_TOKENS:
        return Finding(topic, "doubtful", f"{found}: {'empty' if rms == 0 else 'unusually large'}. Check that the "
                                          "encoder's weights are loaded and belong to this model.")
    return Finding(topic, "good", f"{found}.")


def judge_parameters(topic: str, network: nn.Module) -> Finding:
    """Norm of each part; names of tensors with non-finite or huge values, and of all-zero matrices."""
    parts, broken, zero, huge, count = {}, [], [], [], 0
    for name, value in network.named_parameters():
        count += value.numel()
        value = value.detach().float()
        if not finite([value]):
            broken.append(name)
            continue
        square = value.square().sum().item()
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0.0) + square
        if value.ndim > 1 and square == 0:
            zero.append(name)
        elif (square / value.numel()) ** 0.5 > RMS_WEIGHT:
            huge.append(name)
    norms = ", ".join(f"{part} {square ** 0.5:.1f}" for part, square in parts.items())
    found = f"{count:,} parameters; norms: {norms}"
    if broken:
        return Finding(topic, "bad", f"{found}. NaN or Inf in {_named(broken)}: the file is damaged or its training "
                                     "diverged. Get it again, or use an earlier checkpoint.")
    if zero:
        return Finding(topic, "doubtful", f"{found}. All zero: {_named(zero)}: these layers were never trained, or "
                                          "their weights were not loaded. Check the file.")
    if huge:
        return Finding(topic, "doubtful", f"{found}. Unusually large: {_named(huge)}: training may have diverged, and "
                                          "fp16 may overflow. Try bf16 or fp32, or an earlier checkpoint.")
    return Finding(topic, "good", f"{found}.")


def judge_ema(file_tensors: dict[str, Tensor]) -> Finding | None:
    """Averaged (EMA) weights of a file compared with the raw ones; None for a file without such pairs."""
    pairs = ema_pairs(file_tensors)
    if not pairs:
        return None
    broken = [name for name, (_, ema) in pairs.items() if not finite([ema])]
    if broken:
        return Finding("EMA", "bad", f"NaN or Inf in {_named(broken)}: use the raw weights or an earlier checkpoint.")
    zero = [name for name, (raw, ema) in pairs.items() if raw.any() and not ema.any()]
    difference = sum((raw.float() - ema.float()).square().sum().item() for raw, ema in pairs.values())
    size = sum(raw.float().square().sum().item() for raw, _ in pairs.values())
    apart = (difference / max(size, 1e-30)) ** 0.5
    found = f"{len(pairs)} averaged tensors, relative distance to the raw weights {apart:.2g}"
    if zero:
        return Finding("EMA", "bad", f"{found}. All zero: {_named(zero)}: the average was never initialised from the "
                                     "weights. Use the raw weights. In training, copy them into the average first.")
    if apart > 1:
        return Finding("EMA", "bad", f"{found}: this is not an average of them. Use the raw weights, and check how the "
                                     "average is initialised.")
    if difference == 0:
        return Finding("EMA", "doubtful", f"{found}: equal to them. The average was initialised but never updated (or "
                                          "training has just started).")
    return Finding("EMA", "good", f"{found}.")


def ema_pairs(file_tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(raw, averaged) by raw key: `model_ema.` of latent diffusion files (key without dots), `generator_ema.` with
    `generator.` (Self-Forcing), `averaged.module.` with `net.` (this pack's training state)."""
    pairs = {}
    for key, raw in file_tensors.items():
        names = [f"model_ema.{key.removeprefix('model.').replace('.', '')}"] if key.startswith("model.") else []
        for prefix, average in (("generator.", "generator_ema."), ("net.", "averaged.module.")):
            if key.startswith(prefix):
                names.append(average + key.removeprefix(prefix))
        ema = next((file_tensors[name] for name in names if name in file_tensors), None)
        if ema is not None and ema.shape == raw.shape and raw.is_floating_point():
            pairs[key] = raw, ema
    return pairs


def judge_round_trip(picture_HWC: Tensor, back_HWC: Tensor, sound: bool = False) -> Finding:
    """VAE round trip of a picture in 0..1: decoding its latent must reproduce the picture. sound: the VAE reproduces
    a plain test picture, so if this one is lost, it is unlike the pictures that the VAE was trained on."""
    if not finite([back_HWC]):
        return _not_finite("VAE", back_HWC, "load the VAE as fp32 or bf16 (fp16 overflows in some).")
    error = (picture_HWC - back_HWC).square().mean().item()
    lost = error / max(picture_HWC.var().item(), 1e-6)
    found = f"a picture comes back with {psnr(picture_HWC, back_HWC):.1f} dB, and {lost:.0%} of its contrast is lost"
    if sound and lost > LOST_USUAL:
        return Finding("VAE", "bad" if lost > LOST_BAD else "doubtful",
                       f"{found}, though a plain test picture comes back well: the VAE works, but the reference is "
                       "unlike the pictures that it was trained on. Use a picture of that kind, or a model trained on "
                       "pictures like yours.")
    if lost > LOST_BAD:
        return Finding("VAE", "bad", f"{found}: no better than one flat colour. Its weights are not loaded or belong "
                                     "to another model. Use the VAE of this checkpoint.")
    if lost > LOST_USUAL:
        return Finding("VAE", "doubtful", f"{found}: check that this VAE belongs to the model.")
    return Finding("VAE", "good", f"{found}.")


def judge_decoded(frames_THWC: Tensor, reference_THWC: Tensor | None) -> Finding:
    """Decoded frames: in 0..1, with the mean and standard deviation of a typical picture, or of the reference."""
    if not finite([frames_THWC]):
        return _not_finite("decoded frames", frames_THWC, "check the finding on sampling first, then on the VAE.")
    mean, std = frames_THWC.mean().item(), frames_THWC.std().item()
    low, high = frames_THWC.min().item(), frames_THWC.max().item()
    means, stds, usual = MEAN, STD, "usual"
    if reference_THWC is not None:
        known_mean, known_std = reference_THWC.mean().item(), reference_THWC.std().item()
        means = max(0.0, min(MEAN[0], known_mean - 0.1)), min(1.0, max(MEAN[1], known_mean + 0.1))
        stds = min(STD[0], known_std * 0.7), max(STD[1], known_std * 1.5)
        usual = "usual for this reference"
    found = (f"range {low:.2f} to {high:.2f}, mean {mean:.2f} ({means[0]:.2f} to {means[1]:.2f} is {usual}), standard "
             f"deviation {std:.2f} ({stds[0]:.2f} to {stds[1]:.2f})")
    if low < -0.01 or high > 1.01:
        return Finding("decoded frames", "bad", f"{found}: not within 0..1. Use the VAE of this model.")
    if std < FLAT and stds[0] > FLAT:
        return Finding("decoded frames", "bad", f"{found}: one flat colour. Use more steps, and check the findings on "
                                                "parameters and VAE.")
    if not (means[0] <= mean <= means[1] and stds[0] <= std <= stds[1]):
        return Finding("decoded frames", "doubtful",
                       f"{found}. This is right for a dark, bright or plain scene. Otherwise use more steps, lower "
                       "cfg, or clip x0 (static, 3).")
    return Finding("decoded frames", "good", f"{found}.")


def judge_clipping(plain: SamplingReport, clipped: SamplingReport, quality: tuple[float, float] | None) -> Finding:
    """The same run without and with x0 clipping. quality: PSNR in dB of both against the true frames, if known."""
    counts = ", ".join(f"{count:g}" for count in clipped.columns["beyond"])
    reach = [max(-run.columns["x_min"][-1], run.columns["x_max"][-1]) for run in (plain, clipped)]
    needed = plain.verdict()[0] == "bad" != clipped.verdict()[0]
    found = (f"final latent +-{reach[0]:.1f} without and +-{reach[1]:.1f} with clipping ({clipped.clip_mode}, "
             f"{clipped.limit:g}); of {clipped.values} values clipped at each step: {counts}")
    if quality is None:
        found += ". Connect the true clip as reference to see the effect in dB"
    else:
        gain = quality[1] - quality[0]
        needed = needed or gain >= GAIN
        found = f"PSNR {quality[0]:.1f} dB without, {quality[1]:.1f} dB with clipping ({gain:+.1f} dB); {found}"
    if needed:
        return Finding("clipping", "doubtful", f"{found}. Clipping hides a fault: keep it on (static, 3), and check "
                                               "the scale of the inputs or train the model longer.")
    return Finding("clipping", "good", f"{found}. This run does not need it.")


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures or clips of the same shape in 0..1."""
    return -10 * (a - b).square().mean().clamp(min=1e-10).log10().item()


def _not_finite(topic, values, remedy="check the node that made it (an encoder or VAE in fp16?)."):
    bad = values.numel() - int(torch.isfinite(values).sum())
    return Finding(topic, "bad", f"{bad} of {values.numel()} values are NaN or Inf: {remedy}")


def _named(names):
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
