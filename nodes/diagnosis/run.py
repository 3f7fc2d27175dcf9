"""Runs a model for a few steps and collects findings on the model and its inputs."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..common.files import read_checkpoint
from ..common.images import fit_image
from ..ddim.sampler import NUM_TIMESTEPS, DDIMSettings, sample_latent
from ..ddim.step import Clip
from . import judgement as judge
from .judgement import Diagnosis, Finding
from .probe import finite, tensors, watch

DEPTHS = ("detailed", "quick")
TEST_COLOUR, TEST_GROUND = (0.88, 0.18, 0.18), 0.48


@dataclass(frozen=True)
class Request:
    """What to check. depth: one of DEPTHS; checkpoint: file whose EMA weights are checked, if any."""
    seed: int
    steps: int
    cfg: float
    clip_x0: str
    clip_value: float
    depth: str
    compare_clipping: bool
    checkpoint: Path | None

    def __post_init__(self):
        if self.depth not in DEPTHS:
            raise ValueError(f"depth is '{self.depth}'. Choose one of {', '.join(DEPTHS)}.")

    def settings(self, clip_x0: str) -> DDIMSettings:
        """Deterministic DDIM (eta 0) with otherwise the model's recommended settings."""
        return DDIMSettings(self.steps, self.cfg, 0.0, "auto", -1.0, 1.0, 0.0, Clip(clip_x0, self.clip_value, False), 0,
                            NUM_TIMESTEPS, "fixed")


def diagnose(model, positive, negative, latent: dict, vae, request: Request, reference_THWC: Tensor | None,
             callback: Callable | None = None) -> tuple[Diagnosis, Tensor | None]:
    """(diagnosis, decoded frames [T, H, W, C] or None if nothing could be sampled).

    reference: the start image, or the true clip, in 0..1. Raises ValueError for inconsistent inputs;
    NaN or Inf in them is a finding and ends the diagnosis before sampling.
    """
    findings = _look_at_inputs(model, positive, negative, latent)
    network = model.model.diffusion_model
    if request.depth == "detailed":
        findings.append(judge.judge_parameters("parameters", network))
        findings += _look_at_file(request.checkpoint)
    if not finite(tensors([latent["samples"], positive, negative])):
        return Diagnosis(tuple(findings), None), None

    runs = 1 + request.compare_clipping

    def sample(clip_x0: str, done: int = 0):
        def tell(step, x0, x, total):
            if callback is not None:
                callback(done + step, x0, x, runs * total)  # one bar for all runs

        with watch(network) as probe:
            samples, report = sample_latent(model, positive, negative, latent, request.seed, request.settings(clip_x0),
                                            callback=tell)
        report = replace(report, origin=probe.origin.text() if probe.origin else "")
        return report, vae.decode(samples["samples"])[0].float()

    report, frames_THWC = sample(request.clip_x0)
    if reference_THWC is not None:
        reference_THWC = fit_image(reference_THWC, frames_THWC.shape[2], frames_THWC.shape[1])
    findings.append(Finding("sampling", *report.verdict()))
    if request.depth == "detailed":
        findings += _look_at_vae(vae, _test_picture(*frames_THWC.shape[1:3]), reference_THWC)
    findings.append(judge.judge_decoded(frames_THWC, reference_THWC))
    if _same_clip(frames_THWC, reference_THWC) and finite([frames_THWC]):
        findings.append(Finding("true clip", "good", f"PSNR {judge.psnr(frames_THWC, reference_THWC):.1f} dB against "
                                                     "the reference."))
    if request.compare_clipping:
        other, other_THWC = sample("off" if request.clip_x0 != "off" else "static", request.steps)
        runs = [(report, frames_THWC), (other, other_THWC)]
        plain, clipped = runs if request.clip_x0 == "off" else runs[::-1]
        quality = None
        if _same_clip(frames_THWC, reference_THWC):
            quality = tuple(judge.psnr(torch.nan_to_num(run[1]), reference_THWC) for run in (plain, clipped))
        findings.append(judge.judge_clipping(plain[0], clipped[0], quality))
    return Diagnosis(tuple(findings), report), frames_THWC


def _look_at_inputs(model, positive, negative, latent):
    scaled = model.model.process_latent_in
    findings = [judge.judge_latent("latent", scaled(latent["samples"]) if latent["samples"].any() else
                                   latent["samples"])]
    for name, conditioning in (("positive", positive), ("negative", negative)):
        for tokens, values in conditioning:
            findings.append(judge.judge_tokens(f"{name} text", tokens))
            image = values.get("concat_latent_image")
            if image is not None and name == "positive":
                findings.append(judge.judge_latent("start image", scaled(image)))
    return findings


def _look_at_file(path):
    if path is None:
        return []
    finding = judge.judge_ema(read_checkpoint(path).tensors)
    return [finding or Finding("EMA", "good", f"{path.name} holds only one set of weights, nothing to compare.")]


def _look_at_vae(vae, test_HWC, reference_THWC):
    """Check the VAE's weights and its round trip of a test picture, then of the reference if there is one."""
    def round_trip(picture_HWC, sound=False):
        back = vae.decode(vae.encode(picture_HWC[None])).reshape(-1, *picture_HWC.shape)[0]
        return judge.judge_round_trip(picture_HWC, back.float().to(picture_HWC.device), sound)

    found = round_trip(test_HWC)
    if reference_THWC is not None:
        found = round_trip(reference_THWC[0], found.level == "good")
    return [judge.judge_parameters("VAE weights", vae.first_stage_model), found]


def _test_picture(height, width):
    """A red disc on grey."""
    y, x = torch.meshgrid(torch.arange(height) - height / 2, torch.arange(width) - width / 2, indexing="ij")
    cover_HW1 = (min(height, width) / 4 - (x * x + y * y).sqrt()).clamp(0, 1)[..., None]
    return cover_HW1 * torch.tensor(TEST_COLOUR) + (1 - cover_HW1) * TEST_GROUND


def _same_clip(frames_THWC, reference_THWC):
    return reference_THWC is not None and reference_THWC.shape == frames_THWC.shape
