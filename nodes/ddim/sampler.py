"""DDIM as a ComfyUI sampler: core's models work in sigma space, the update in the variance-preserving scale.

A latent x here is X / n of core's X, with n = sqrt(1 + sigma^2). The model keeps its own sigma table, capped where
alpha_bar is 0. Its v or eps is recovered exactly from what core returns, and the step uses our float64 tables.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from . import guidance
from .inputs import check_inputs
from .report import Recorder, SamplingReport
from .schedule import NUM_TIMESTEPS, SPACINGS, DDIMTables, make_alphas_cumprod, make_scale_arr, make_tables
from .step import Clip, ddim_step

Noise = Callable[[int], torch.Tensor]
TABLES = ("fixed", "original")
AUTO_RESCALE = -1.0
OWN_STEPS, OWN_CFG = 0, -1.0  # the model's own


@dataclass(frozen=True)
class DDIMSettings:
    """Settings of one run. spacing "auto" and guidance_rescale -1: what the model recommends. image_cfg 0: off."""
    steps: int
    cfg: float
    eta: float
    spacing: str
    guidance_rescale: float
    denoise: float
    image_cfg: float
    clip: Clip
    start_step: int
    end_step: int
    tables: str

    def __post_init__(self):
        if not 1 <= self.steps <= NUM_TIMESTEPS:
            raise ValueError(f"steps is {self.steps}. Choose 1 to {NUM_TIMESTEPS}.")
        for name, value, allowed in (("spacing", self.spacing, ("auto", *SPACINGS)), ("tables", self.tables, TABLES)):
            if value not in allowed:
                raise ValueError(f"{name} is '{value}'. Choose one of {', '.join(allowed)}.")
        if self.cfg < 0:
            raise ValueError(f"cfg is {self.cfg}. Choose 0 or more, or -1 for the model's own.")
        if self.guidance_rescale != AUTO_RESCALE and not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.guidance_rescale}. Choose 0 to 1, or -1 for the model's own.")
        if not 0 < self.denoise <= 1:
            raise ValueError(f"denoise is {self.denoise}. Choose a value above 0 and up to 1 (start from noise).")
        if not 0 <= self.start_step < self.end_step:
            raise ValueError(f"start_step is {self.start_step} and end_step is {self.end_step}, which leaves no step. "
                             "start_step must be at least 0 and below end_step.")
        if self.start_step >= self.steps:
            raise ValueError(f"start_step is {self.start_step}, but there are only {self.steps} steps. Choose a "
                             "smaller start_step.")


def own_settings(model, steps: int, cfg: float) -> tuple[int, float]:
    """steps and cfg, with the model's own values for OWN_STEPS and OWN_CFG. Raises ValueError if it has none."""
    params = getattr(model.model, "diffusion_params", None)
    if params is None and (steps == OWN_STEPS or cfg == OWN_CFG):
        raise ValueError(f"steps is {steps} and cfg is {cfg:g}. 0 steps and cfg -1 mean the model's own, but this "
                         "model is of another family and has none: set both, for example 20 steps and cfg 7.")
    return params.steps if steps == OWN_STEPS else steps, params.cfg if cfg == OWN_CFG else cfg


class Schedule(NamedTuple):
    """A model's schedule. sigmas: core's own table, the only scale in which the model is called."""
    parameterization: str
    alphas_cumprod: torch.Tensor
    scale_arr: torch.Tensor | None
    spacing: str
    guidance_rescale: float
    sigmas: list[float]


def model_schedule(model: comfy.model_patcher.ModelPatcher) -> Schedule:
    """Schedule of any eps or v model with 1000 timesteps; those of our models are rebuilt in float64 from the betas."""
    sampling = model.get_model_object("model_sampling")
    sigmas = getattr(sampling, "sigmas", torch.zeros(0)).cpu()
    if len(sigmas) != NUM_TIMESTEPS or sampling.timestep(sigmas).tolist() != list(range(NUM_TIMESTEPS)):
        raise ValueError(f"This model has no noise schedule of {NUM_TIMESTEPS} discrete timesteps, which DDIM needs. "
                         "DynamiCrafter and Stable Diffusion models have one; for flow models use KSampler.")
    params = getattr(model.model, "diffusion_params", None)
    if params is not None and _parameterization(sampling) == params.parameterization \
            and torch.allclose(sigmas, model.model.model_sampling.sigmas.cpu()):  # a core node may have changed it
        return Schedule(params.parameterization, make_alphas_cumprod(params), make_scale_arr(params.base_scale),
                        params.spacing, params.guidance_rescale, sigmas.tolist())
    alphas_cumprod, parameterization = 1 / (1 + sigmas.double() ** 2), _parameterization(sampling)
    if parameterization == "eps" and alphas_cumprod[-1] < 1e-6:
        raise ValueError("This model predicts eps with zero terminal SNR (zsnr): its last timestep is pure noise, so "
                         "x0 cannot be computed from eps. Switch zsnr off in ModelSamplingDiscrete, or choose "
                         "v_prediction for a model that was trained with it.")
    return Schedule(parameterization, alphas_cumprod, None, "uniform", 0.0, sigmas.tolist())


def _parameterization(sampling) -> str:
    """What the network predicts, found from how core turns a prediction into the denoised latent."""
    sigma, one, zero = torch.tensor([1.0]), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    denoised = [sampling.calculate_denoised(sigma, *pair).item() for pair in ((one, zero), (zero, one))]
    for name, expected in (("eps", (-1.0, 1.0)), ("v", (-(0.5 ** 0.5), 0.5))):
        if all(abs(a - b) < 1e-6 for a, b in zip(denoised, expected)):
            return name
    raise ValueError("This model predicts neither eps nor v, so the DDIM update does not fit it: use KSampler.")


class DDIMSampler(comfy.samplers.Sampler):
    """Core sampler object that samples along `tables` from their end; SIGMAS select the steps to take.

    noise(step) returns the noise added at a step (0: the first of the whole table); None: drawn on the CPU from the
    seed. recorder, if given, collects the report.
    """

    def __init__(self, schedule: Schedule, tables: DDIMTables, guidance_rescale: float, clip: Clip,
                 noise: Noise | None = None, recorder: Recorder | None = None):
        self.schedule, self.tables, self.guidance_rescale, self.clip = schedule, tables, guidance_rescale, clip
        self.noise, self.recorder = noise, recorder

    def sigmas(self) -> torch.Tensor:
        """Core SIGMAS of the whole table: [steps + 1], descending, ending in 0."""
        return torch.tensor([self.schedule.sigmas[t] for t in reversed(self.tables.timesteps)] + [0.0])

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        """Called by core's guiders. noise, latent_image: [B, C, ...]; returns the latent in core's scale."""
        table_sigmas = self.sigmas().tolist()
        first, last = _span(table_sigmas, sigmas.tolist())
        options = extra_args["model_options"]
        if self.guidance_rescale > 0:
            options = comfy.model_patcher.set_model_options_post_cfg_function(options, self._rescale_guidance)
        step_noise = self.noise or seeded_noise(extra_args["seed"], noise.shape, noise.device)
        x = noise if first == 0 else _add_noise(latent_image, noise, table_sigmas[first])
        mask = denoise_mask
        for k in range(first, last):
            comfy.model_management.throw_exception_if_processing_interrupted()
            sigma = table_sigmas[k]
            mask = _mask_at(sigma, denoise_mask, options, model_wrap, sigmas)
            if mask is not None:
                x = _paste(x, _add_noise(latent_image, noise, sigma), mask)
            denoised = model_wrap(x * _norm(sigma), x.new_full((x.shape[0],), sigma), model_options=options,
                                  seed=extra_args["seed"])
            output = model_output(x, denoised, sigma, self.schedule.parameterization)
            c = self.tables.step(len(self.tables) - 1 - k)
            step = ddim_step(x, output, self.schedule.parameterization, c, self.clip,
                             step_noise(k) if c.sigma else None)
            x = step.x
            if self.recorder:
                self.recorder.record(c.timestep, step.x0_raw, x)
            if callback:
                x0 = step.x0 if mask is None else _paste(step.x0, latent_image, mask)
                callback(k - first, x0, x, last - first)
        end = table_sigmas[last]
        if mask is not None:
            x = _paste(x, _add_noise(latent_image, noise, end), mask)
        return x * _norm(end)  # a noisy latent is returned in core's scale: any sampler can continue from it

    def _rescale_guidance(self, args):
        """Core post-cfg hook: guidance rescale on what the network predicted, over C, T, H and W together."""
        sigma, kind = args["sigma"][0], self.schedule.parameterization
        x = args["input"] / _norm(sigma)
        cond, guided = (model_output(x, args[name], sigma, kind) for name in ("cond_denoised", "denoised"))
        rescaled = guidance.rescale(guided, cond, self.guidance_rescale)
        return denoised_from(x, rescaled, sigma, kind)


def model_output(x: torch.Tensor, denoised: torch.Tensor, sigma: float, parameterization: str) -> torch.Tensor:
    """The network's v or eps from the denoised latent that core computed; x in the variance-preserving scale."""
    n = _norm(sigma)
    if parameterization == "v":
        return (x / n - denoised) * (n / sigma)
    return (x * n - denoised) / sigma


def denoised_from(x: torch.Tensor, output: torch.Tensor, sigma: float, parameterization: str) -> torch.Tensor:
    """The inverse of model_output."""
    n = _norm(sigma)
    return x / n - output * (sigma / n) if parameterization == "v" else x * n - output * sigma


def seeded_noise(seed: int, shape: torch.Size, device: torch.device) -> Noise:
    """Noise of each step from the seed, drawn on the CPU: the same on any machine, and the same for a step whether
    the run is made in one part or in several."""
    pinned = device.type == "cuda"

    def noise(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((seed + (step + 1) * 0x9E3779B97F4A7C15) % 2 ** 64)
        return torch.randn(shape, generator=generator, pin_memory=pinned).to(device, non_blocking=True)

    return noise


def _norm(sigma):
    return (1 + sigma * sigma) ** 0.5


def _add_noise(latent, noise, sigma):
    return latent / _norm(sigma) + noise * (sigma / _norm(sigma))


def _paste(x, kept, mask):
    return x * mask + kept * (1 - mask)


def _mask_at(sigma, mask, options, model_wrap, sigmas):
    """The noise mask of a step: core's Differential Diffusion changes it over time."""
    if mask is None or "denoise_mask_function" not in options:
        return mask
    return options["denoise_mask_function"](mask.new_tensor(sigma), mask,
                                            extra_options={"model": model_wrap, "sigmas": sigmas})


def _span(table_sigmas, sigmas):
    """Steps [first, last) of the table that core SIGMAS select."""
    count = len(sigmas)
    for first in range(len(table_sigmas) - count + 1):
        if table_sigmas[first:first + count] == sigmas:
            return first, first + count - 1
    raise ValueError("These SIGMAS do not belong to this DDIM sampler. Connect both SAMPLER and SIGMAS from the same "
                     "DDIM Sampler Select node with the same model. Split Sigmas may be between.")


class ImageTextGuider(comfy.samplers.CFGGuider):
    """Separate guidance by image and text; the three predictions are made in one batch."""

    def set_image_conds(self, positive, image, negative):
        """image: the negative text with the positive's image."""
        image = [[cond, {**values, "prompt_type": "negative"}] for cond, values in image]
        self.inner_set_conds({"positive": positive, "image": image, "negative": negative})

    def set_image_cfg(self, cfg, image_cfg):
        self.set_cfg(cfg)
        self.image_cfg = image_cfg

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        conds = [self.conds["negative"], self.conds["image"], self.conds["positive"]]
        uncond, image, cond = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        denoised = guidance.cfg_image_text(uncond, image, cond, self.image_cfg, self.cfg)
        for function in model_options.get("sampler_post_cfg_function", []):
            denoised = function({
                "denoised": denoised, "cond": conds[2], "uncond": conds[0], "cond_scale": self.cfg, "sigma": timestep,
                "model": self.inner_model, "uncond_denoised": uncond, "cond_denoised": cond, "input": x,
                "model_options": model_options})
        return denoised


def make_guider(model, positive, negative, cfg: float, image_cfg: float) -> comfy.samplers.CFGGuider:
    """Core's guider (cfg 1 skips the negative forward pass), or the one for three predictions if image_cfg is not 0."""
    if image_cfg == 0:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return guider
    if model.model_options.keys() & {"sampler_cfg_function", "sampler_pre_cfg_function"}:
        raise ValueError(f"image_cfg is {image_cfg:g}, but a node on the model (RescaleCFG, RenormCFG, FreSca or "
                         "another) changes guidance with two predictions, not with three. Set image_cfg to 0, or "
                         "remove that node.")
    guider = ImageTextGuider(model)
    tokens = positive[0][1]["image_tokens"]
    seen = [[cond, {**values, "image_tokens": tokens}] for cond, values in negative]
    guider.set_image_conds(positive, seen, negative)
    guider.set_image_cfg(cfg, image_cfg)
    return guider


def make_sampler(model, settings: DDIMSettings, noise: Noise | None = None,
                 report: bool = False) -> tuple[DDIMSampler, torch.Tensor]:
    """(sampler, SIGMAS) for a model. denoise below 1 uses the last `steps` of a longer table, as KSampler does."""
    schedule = model_schedule(model)
    spacing = schedule.spacing if settings.spacing == "auto" else settings.spacing
    rescale = schedule.guidance_rescale if settings.guidance_rescale == AUTO_RESCALE else settings.guidance_rescale
    total = int(settings.steps / settings.denoise)
    if total > NUM_TIMESTEPS:
        raise ValueError(f"{settings.steps} steps at denoise {settings.denoise:g} are the end of a run of {total} "
                         f"steps, but there are {NUM_TIMESTEPS} timesteps. Use fewer steps or a higher denoise.")
    original = settings.tables == "original"
    tables = make_tables(schedule.alphas_cumprod, total, spacing, settings.eta, schedule.scale_arr, original)
    recorder = None
    if report:
        text = (f"{settings.steps} steps, {spacing}, eta {settings.eta:g}, cfg {settings.cfg:g}"
                f"{f', image cfg {settings.image_cfg:g}' if settings.image_cfg else ''}, guidance rescale {rescale:g}, "
                f"denoise {settings.denoise:g}, x0 clip {settings.clip.mode}, {settings.tables} tables")
        recorder = Recorder(text, settings.clip.mode, settings.clip.limit, original)
    sampler = DDIMSampler(schedule, tables, rescale, settings.clip, noise, recorder)
    sigmas = sampler.sigmas()
    if settings.denoise < 1:
        sigmas = sigmas[-(settings.steps + 1):]
    return sampler, sigmas[settings.start_step:settings.end_step + 1]


def sample_latent(model, positive, negative, latent: dict, seed: int, settings: DDIMSettings,
                  start_noise: torch.Tensor | None = None, noise: Noise | None = None,
                  callback: Callable | None = None) -> tuple[dict, SamplingReport]:
    """Sample a LATENT. start_noise: [B, C, ...] instead of the one drawn from the seed; noise: see DDIMSampler.

    callback(step, x0, x, steps) is called after each step. Where a noise mask is 0, the latent is returned unchanged.
    """
    check_inputs(model, positive, negative, latent, start_noise, settings.image_cfg)
    sampler, sigmas = make_sampler(model, settings, noise, report=True)
    samples = latent["samples"]
    if start_noise is None:
        start_noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    guider = make_guider(model, positive, negative, settings.cfg, settings.image_cfg)
    mask = latent.get("noise_mask")
    result = guider.sample(start_noise, samples, sampler, sigmas, denoise_mask=mask, callback=callback, seed=seed)
    result = result.to(comfy.model_management.intermediate_device())
    if mask is not None and sigmas[-1] == 0:
        kept = comfy.utils.reshape_mask(mask, samples.shape).to(result.device) == 0
        result = torch.where(kept, samples.to(result), result)
    image = positive[0][1].get("concat_latent_image")
    reach = 0.0 if image is None else model.model.process_latent_in(image).abs().max().item()
    return {**latent, "samples": result}, sampler.recorder.finish(reach)
