"""A stub network inside ComfyUI's sampling code, and a second implementation of the sampling loop."""
import dataclasses
from fractions import Fraction

import comfy.latent_formats
import comfy.supported_models_base
import torch
from comfy import conds, model_base, model_patcher
from stillmotion.nodes.ddim import sampler as ours
from stillmotion.nodes.ddim.schedule import DiffusionParams
from stillmotion.nodes.ddim.step import Clip

SHAPE = (2, 4, 3, 4, 6)
PARAMS = {
    "eps": DiffusionParams("eps", 0.00085, 0.012, False, None, "uniform", 0.0),
    "v": DiffusionParams("v", 0.00085, 0.012, False, None, "uniform_trailing", 0.0),
    "zsnr": DiffusionParams("v", 0.00085, 0.012, True, 0.7, "uniform_trailing", 0.7),
}


class StubNet(torch.nn.Module):
    """Depends on x, timestep, text and image, with a Linear that a LoRA can patch."""

    def __init__(self, dtype=None, device=None, operations=torch.nn):
        super().__init__()
        self.dtype, self.calls, self.batches = dtype, 0, []
        self.mix = operations.Linear(4, 4, bias=False, dtype=dtype, device=device)

    def forward(self, x, t, context=None, image_tokens=None, **kwargs):
        self.calls += 1
        self.batches.append(x.shape[0])
        def view(v):
            return v.reshape(-1, 1, 1, 1, 1)
        pushed = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        told = view(context.mean((1, 2))) + 0.3 * view(image_tokens.mean((1, 2)))
        return torch.tanh(pushed + told) + 0.1 * torch.cos(view(t) / 100) * torch.sin(3 * x + told)


class VideoLatents(comfy.latent_formats.SD15):
    latent_dimensions = 3

    def __init__(self):
        super().__init__()
        self.taesd_decoder_name = None


class StubBase(model_base.BaseModel):
    def extra_conds(self, **kwargs):
        out = super().extra_conds(**kwargs)
        if "image_tokens" in kwargs:
            out["image_tokens"] = conds.CONDRegular(kwargs["image_tokens"])
        return out


class StubConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    latent_format = VideoLatents


def stub_model(kind):
    params = PARAMS[kind]
    config = StubConfig({})
    config.sampling_settings = {"linear_start": 0.00085, "linear_end": 0.012, "zsnr": params.zero_snr}
    config.set_inference_dtype(torch.float32, None)
    kind = model_base.ModelType.V_PREDICTION if params.parameterization == "v" else model_base.ModelType.EPS
    base = StubBase(config, kind, unet_model=StubNet)
    torch.manual_seed(7)
    torch.nn.init.normal_(base.diffusion_model.mix.weight, std=0.5)
    base.diffusion_params = params
    cpu = torch.device("cpu")
    return model_patcher.ModelPatcher(base, cpu, cpu)


def conditioning():
    torch.manual_seed(3)
    texts, images = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 6, 8)
    return [[[texts[i], {"image_tokens": images[i]}]] for i in range(2)]


def empty_latent():
    return {"samples": torch.zeros(SHAPE)}


BASE = ours.DDIMSettings(
    steps=6, cfg=3.0, eta=1.0, spacing="auto", guidance_rescale=-1.0, denoise=1.0, image_cfg=0.0,
    clip=Clip("off", 3.0, False), start_step=0, end_step=1000, tables="fixed")


def settings(**changes):
    return dataclasses.replace(BASE, **changes)


def run(kind, chosen, latent=None, seed=5, **kwargs):
    model = kwargs.pop("model", None) or stub_model(kind)
    positive, negative = conditioning()
    return ours.sample_latent(model, positive, negative, latent or empty_latent(), seed, chosen, **kwargs)


def plain_ddim(kind, chosen, x, step_noise, latent=None, mask=None, noise=None):
    """A second implementation of the variance-preserving loop, in float64, without ComfyUI and without our tables."""
    params = PARAMS[kind]
    net = stub_model(kind).model.diffusion_model.double()
    (text, image), (empty, grey) = [(c[0][0].double(), c[0][1]["image_tokens"].double()) for c in conditioning()]
    bar = 1.0
    bars = []
    for i in range(1000):
        bar *= 1 - (0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * i / 999) ** 2
        bars.append(bar)
    if params.zero_snr:
        root = [b ** 0.5 for b in bars]
        bars = [((r - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 for r in root]
    scales = [1 + (params.base_scale - 1) * min(i / 399, 1) if params.base_scale else 1.0 for i in range(1000)]
    total = int(chosen.steps / chosen.denoise)
    if (params.spacing if chosen.spacing == "auto" else chosen.spacing) == "uniform":
        times = [min(1 + 1000 * i // total, 999) for i in range(total)]
    else:
        times = [round(Fraction(1000 * (i + 1), total)) - 1 for i in range(total)]
    begin = total - chosen.steps + chosen.start_step
    if begin:
        a = bars[times[total - 1 - begin]]
        x = a ** 0.5 * latent + (1 - a) ** 0.5 * noise
    amount = params.guidance_rescale if chosen.guidance_rescale == -1 else chosen.guidance_rescale
    for k in range(begin, min(total, total - chosen.steps + chosen.end_step)):
        i = total - 1 - k
        t, before = times[i], times[i - 1] if i else 0
        a, a_prev = bars[t], bars[before]
        if mask is not None:
            x = mask * x + (1 - mask) * (a ** 0.5 * latent + (1 - a) ** 0.5 * noise)
        def predict(context, tokens):
            return net(x, x.new_full((SHAPE[0],), t), context.expand(2, -1, -1), tokens.expand(2, -1, -1))
        both, none = predict(text, image), predict(empty, grey)
        out = none + chosen.cfg * (both - none)
        if chosen.image_cfg:
            seen = predict(empty, image)
            out = none + chosen.image_cfg * (seen - none) + chosen.cfg * (both - seen)
        for b in range(SHAPE[0]):
            out[b] *= 1 + amount * ((both[b].std() / out[b].std()).item() - 1)
        if params.parameterization == "v":
            x0, eps = a ** 0.5 * x - (1 - a) ** 0.5 * out, a ** 0.5 * out + (1 - a) ** 0.5 * x
        else:
            x0, eps = (x - (1 - a) ** 0.5 * out) / a ** 0.5, out
        if chosen.clip.mode == "static":
            x0 = x0.clamp(-chosen.clip.limit, chosen.clip.limit)
        if chosen.clip.mode == "dynamic":
            for b in range(SHAPE[0]):
                reach = max(float(torch.quantile(x0[b].abs().flatten(), 0.995)), chosen.clip.limit)
                x0[b] = x0[b].clamp(-reach, reach) / reach * chosen.clip.limit
        if chosen.clip.mode != "off" and chosen.clip.recompute_eps:
            eps = (x - a ** 0.5 * x0) / (1 - a) ** 0.5
        if i:
            x0 = x0 * scales[before] / scales[t]
        variance = 0.0 if a_prev == a else (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        sigma = chosen.eta * variance ** 0.5
        x = a_prev ** 0.5 * x0 + max(1 - a_prev - sigma ** 2, 0) ** 0.5 * eps + sigma * step_noise(k)
    return x if mask is None else mask * x + (1 - mask) * latent
