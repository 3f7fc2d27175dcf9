"""The fixed sampler for models built by the official DynamiCrafter code, with the official calling conventions.

Works on any object with that model's attributes: alphas_cumprod, parameterization, use_dynamic_rescale, scale_arr,
apply_model, get_learned_conditioning, embedder, image_proj_model, encode_first_stage, decode_first_stage, uncond_type,
model.conditioning_key. `original=True` uses the official tables.
"""
import torch

from . import guidance
from .schedule import NUM_TIMESTEPS, DiffusionParams, make_alphas_cumprod, make_tables
from .step import Clip, ddim_step

NO_CLIP = Clip("off", 3.0, False)


def get_fixed_ddim_sampler(model, ddim_steps: int, ddim_eta: float, timestep_spacing: str = "uniform",
                           original: bool = False) -> "OfficialDDIMSampler":
    """A sampler with the official `sample` method, its tables built and on the model's device."""
    sampler = OfficialDDIMSampler(model, original)
    sampler.make_schedule(ddim_steps, timestep_spacing, ddim_eta)
    return sampler


class OfficialDDIMSampler:
    """Replaces the official DDIMSampler and DDIMSampler_multicond."""

    def __init__(self, model, original: bool = False):
        self.model, self.original = model, original
        self.device = getattr(model, "device", model.alphas_cumprod.device)

    def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=False):
        """Build the tables; the official buffer names hold them in float32 on the model's device."""
        scale_arr = self.model.scale_arr if self.model.use_dynamic_rescale else None
        alphas_cumprod = self.model.alphas_cumprod if self.original else exact_alphas_cumprod(self.model)
        tables = make_tables(alphas_cumprod, ddim_num_steps, ddim_discretize, ddim_eta, scale_arr, self.original)
        self.tables = tables
        self.ddim_timesteps = torch.tensor(tables.timesteps, device=self.device)
        for name, values in (
                ("ddim_sigmas", tables.sigmas), ("ddim_alphas", tables.alphas),
                ("ddim_alphas_prev", tables.alphas_prev), ("ddim_sqrt_one_minus_alphas", (1 - tables.alphas).sqrt()),
                ("ddim_scale_arr", tables.scale), ("ddim_scale_arr_prev", tables.scale_prev)):
            setattr(self, name, values.to(self.device, torch.float32))

    @torch.no_grad()
    def sample(self, S, batch_size, shape, conditioning=None, callback=None, normals_sequence=None, img_callback=None,
               quantize_x0=False, eta=0.0, mask=None, x0=None, temperature=1.0, noise_dropout=0.0, score_corrector=None,
               corrector_kwargs=None, verbose=True, schedule_verbose=False, x_T=None, log_every_t=100,
               unconditional_guidance_scale=1.0, unconditional_conditioning=None, precision=None, fs=None,
               timestep_spacing="uniform", guidance_rescale=0.0, clean_cond=False, **kwargs):
        """(samples [B, *shape], intermediates) as in the official code; noise is drawn in the same order.

        mask: 1 keeps x0. The verbose switches have no effect; other keywords are passed to apply_model.
        """
        self.make_schedule(S, timestep_spacing, eta)
        x = torch.randn((batch_size, *shape), device=self.device) if x_T is None else x_T
        if precision == 16:
            x = x.half()
        intermediates = {"x_inter": [x], "pred_x0": [x]}
        predict = self._predictor(conditioning, unconditional_conditioning, unconditional_guidance_scale,
                                  guidance_rescale, score_corrector, corrector_kwargs, fs=fs, **kwargs)
        for index in reversed(range(len(self.tables))):
            c = self.tables.step(index)
            t = torch.full((batch_size,), c.timestep, device=self.device, dtype=torch.long)
            if mask is not None:
                known = x0 if clean_cond else c.alpha ** 0.5 * x0 + (1 - c.alpha) ** 0.5 * torch.randn_like(x0)
                x = known * mask + (1 - mask) * x
            noise = torch.nn.functional.dropout(temperature * torch.randn_like(x), noise_dropout)
            x, pred_x0, _ = ddim_step(x, predict(x, t), self.model.parameterization, c, NO_CLIP, noise)
            if quantize_x0:
                quantized = self.model.first_stage_model.quantize(pred_x0)[0]
                x, pred_x0 = x + c.alpha_prev ** 0.5 * (quantized - pred_x0), quantized
            step = len(self.tables) - 1 - index
            if callback:
                callback(step)
            if img_callback:
                img_callback(pred_x0, step)
            if index % log_every_t == 0 or step == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    def _predictor(self, cond, uncond, scale, rescale, corrector, corrector_kwargs, cfg_img=None,
                   unconditional_conditioning_img_nonetext=None, **kwargs):
        """The guided prediction as a function of (x, t)."""
        model, image_only = self.model, unconditional_conditioning_img_nonetext
        if corrector is not None and model.parameterization == "v":
            raise ValueError("score_corrector works on eps, but this model predicts v. Leave it out.")

        def predict(x, t):
            output = e_cond = model.apply_model(x, t, cond, **kwargs)
            if uncond is not None and scale != 1:
                e_uncond = model.apply_model(x, t, uncond, **kwargs)
                if image_only is None:
                    output = guidance.cfg(e_uncond, e_cond, scale)
                else:
                    e_image = model.apply_model(x, t, image_only, **kwargs)
                    image_scale = scale if cfg_img is None else cfg_img
                    output = guidance.cfg_image_text(e_uncond, e_image, e_cond, image_scale, scale)
                output = guidance.rescale(output, e_cond, rescale)
            if corrector is not None:
                output = corrector.modify_score(model, output, x, t, cond, **corrector_kwargs)
            return output

        return predict


def exact_alphas_cumprod(model) -> torch.Tensor:
    """alpha_bar in float64, rebuilt from the betas if the model names them: its buffers may have been through fp16."""
    stored = model.alphas_cumprod.detach().to("cpu", torch.float64)
    if len(stored) != NUM_TIMESTEPS:
        raise ValueError(f"The model has {len(stored)} diffusion timesteps. {NUM_TIMESTEPS} are needed.")
    if hasattr(model, "linear_start"):
        zero_snr = bool(getattr(model, "rescale_betas_zero_snr", False))
        exact = make_alphas_cumprod(DiffusionParams(model.parameterization, model.linear_start, model.linear_end,
                                                    zero_snr, None, "uniform", 0.0))
        if torch.allclose(stored, exact, rtol=0, atol=5e-3):  # bf16 rounding; otherwise the betas were given by hand
            return exact
    return stored


def image_guided_synthesis_fixed(model, prompts, videos, noise_shape, n_samples=1, ddim_steps=50, ddim_eta=1.0,
                                 unconditional_guidance_scale=1.0, fs=None, *, text_input=True, multiple_cond_cfg=False,
                                 cfg_img=None, loop=False, interp=False, timestep_spacing="uniform",
                                 guidance_rescale=0.0, original=False, **kwargs) -> torch.Tensor:
    """Videos [B, n_samples, 3, T, H, W] in about [-1, 1] from the first frames of `videos` [B, 3, T, H, W].

    noise_shape: [B, C, T, h, w]. loop and interp use the last frame as well. text_input=False ignores the prompts.
    multiple_cond_cfg: image guidance cfg_img separate from text guidance. 512 and 1024 models need timestep_spacing
    "uniform_trailing" and guidance_rescale 0.7. Everything else is as in the official image_guided_synthesis.
    """
    batch = noise_shape[0]
    image_BCHW = videos[:, :, 0]
    text_emb = model.get_learned_conditioning(prompts if text_input else [""] * batch)
    image_emb = _image_tokens(model, image_BCHW)
    concat = _concat_latent(model, videos, loop or interp)
    cond = {"c_crossattn": [torch.cat([text_emb, image_emb], 1)], **concat}
    uncond, image_only = None, None
    if unconditional_guidance_scale != 1.0:
        empty_emb = model.get_learned_conditioning([""] * batch) if model.uncond_type == "empty_seq" \
            else torch.zeros_like(text_emb)
        grey_emb = _image_tokens(model, torch.zeros_like(image_BCHW))
        uncond = {"c_crossattn": [torch.cat([empty_emb, grey_emb], 1)], **concat}
        if multiple_cond_cfg:
            image_only = {"c_crossattn": [torch.cat([empty_emb, image_emb], 1)], **concat}
    sampler = OfficialDDIMSampler(model, original)
    variants = []
    for _ in range(n_samples):
        samples, _ = sampler.sample(
            ddim_steps, batch, noise_shape[1:], cond, eta=ddim_eta, timestep_spacing=timestep_spacing,
            unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=uncond,
            unconditional_conditioning_img_nonetext=image_only, cfg_img=cfg_img, guidance_rescale=guidance_rescale,
            fs=None if fs is None else torch.tensor([fs] * batch, dtype=torch.long, device=sampler.device), **kwargs)
        variants.append(model.decode_first_stage(samples))
    return torch.stack(variants, 1)


def _image_tokens(model, image_BCHW):
    return model.image_proj_model(model.embedder(image_BCHW))


def _concat_latent(model, videos_BCTHW, both_ends):
    """The image latent that is concatenated with the noise: repeated over time, or at both ends with zeros between."""
    if model.model.conditioning_key != "hybrid":
        return {}
    frames = videos_BCTHW.transpose(1, 2)
    z = model.encode_first_stage(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
    if both_ends:
        kept = torch.zeros_like(z)
        kept[:, :, [0, -1]] = z[:, :, [0, -1]]
        return {"c_concat": [kept]}
    return {"c_concat": [z[:, :, :1].expand_as(z)]}
