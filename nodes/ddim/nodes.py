"""DDIM Sampler, DDIM Sampler Select and Sampling Report."""
from comfy_api.latest import io

from ..common.drawing import as_images
from ..common.memory import memory_advice
from ..common.preview import step_preview
from ..common.schema import schema
from .plot import draw_report
from .sampler import TABLES, DDIMSettings, make_sampler, own_settings, sample_latent
from .schedule import SPACINGS
from .step import CLIP_MODES, Clip

Report = io.Custom("STILLMOTION_REPORT")
LESS_MEMORY = "Use a smaller model or size, fewer frames, or cfg 1 with image_cfg 0 (one prediction per step)."

STEPS = io.Int.Input("steps", default=0, min=0, max=1000,
                     tooltip="Number of denoising steps. 0: the model's own (DynamiCrafter 50, small models 20). 20 to "
                             "25 are often enough.")
ETA = io.Float.Input("eta", default=1.0, min=0.0, max=1.0, step=0.01,
                     tooltip="Noise added back at each step. 1 is the official setting and gives more motion; 0 is "
                             "deterministic.")
SPACING = io.Combo.Input("spacing", options=["auto", *SPACINGS], default="auto",
                         tooltip="Which timesteps are sampled. auto: uniform for the 256 model, uniform_trailing "
                                 "(starts at the very last timestep) for 512 and 1024.")
RESCALE = io.Float.Input("guidance_rescale", default=-1.0, min=-1.0, max=1.0, step=0.05,
                         tooltip="Reduces the contrast of the guided prediction towards that of the unguided one, over "
                                 "the whole video at once. -1: the model's recommended value (0.7 for 512 and 1024, 0 "
                                 "for 256); 0: off; 1: fully.")
DENOISE = io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                         tooltip="1: start from pure noise. Below 1, part of the input latent is kept (video to "
                                 "video), with the same number of steps.")
CLIP = io.Combo.Input("clip_x0", options=list(CLIP_MODES), default="off",
                      tooltip="Keeps the predicted clean latent in range at each step, against colour noise. static: "
                              "clamp to +-clip_value. dynamic: scale a sample down if 0.5 % of it is beyond.")
CLIP_VALUE = io.Float.Input("clip_value", default=3.0, min=0.1, max=100.0, step=0.1,
                            tooltip="Limit for clip_x0, and for what the report counts as out of range. 3 suits image "
                                    "latents; 4 is milder.")
RECOMPUTE = io.Boolean.Input("recompute_eps", default=False,
                             tooltip="After clipping, compute the noise direction from the clipped prediction. Usually "
                                     "off.")
TABLE = io.Combo.Input("tables", options=list(TABLES), default="fixed",
                       tooltip="fixed: exact tables, never NaN. original: those of the official code, for comparison; "
                               "at 7, 11, 14, 15, 20, 25, ... steps with eta 1 they end in NaN.")


class DDIMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_DDIMSampler",
            display_name="DDIM Sampler (fixed)",
            category="Stillmotion/sampling",
            description="Denoises a latent with DDIM as DynamiCrafter was meant to be sampled: exact step count, no "
                        "NaN at any setting, and a report of each step.",
            search_aliases=["ksampler", "denoise video", "sample video", "eta", "guidance rescale",
                            "zero terminal snr"],
            advanced=["spacing", "guidance_rescale", "denoise", "image_cfg", "clip_x0", "clip_value", "recompute_eps",
                      "start_step", "end_step", "tables"],
            inputs=[
                io.Model.Input("model", tooltip="The video model; any eps or v model with 1000 timesteps works."),
                io.Conditioning.Input("positive", tooltip="From the model's conditioning node, such as DynamiCrafter "
                                                          "Image to Video."),
                io.Conditioning.Input("negative", tooltip="What to avoid, from the same node. Not used at cfg 1."),
                io.Latent.Input("latent", tooltip="The empty latent from the conditioning node, or a video latent with "
                                                  "denoise below 1. Its noise mask is respected."),
                io.Int.Input("seed", default=123, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="Seed of the noise, drawn on the CPU: the same on every machine."),
                STEPS,
                io.Float.Input("cfg", default=-1.0, min=-1.0, max=100.0, step=0.1,
                               tooltip="How strongly the prompt (and the image) is followed. -1: the model's own (7.5 "
                                       "for the official models, 1.5 for the demos); 1 is twice as fast and ignores "
                                       "the negative prompt."),
                ETA, SPACING, RESCALE, DENOISE,
                io.Float.Input("image_cfg", default=0.0, min=0.0, max=100.0, step=0.1,
                               tooltip="0: off. Otherwise image and prompt have separate strengths: this one for the "
                                       "image, cfg for the prompt. Three predictions per step, in one batch."),
                CLIP, CLIP_VALUE, RECOMPUTE,
                io.Int.Input("start_step", default=0, min=0, max=999,
                             tooltip="First step to sample. Above 0, noise is added to the input latent for that "
                                     "step."),
                io.Int.Input("end_step", default=1000, min=1, max=1000,
                             tooltip="Stop before this step. If it is below steps, the output latent is still noisy: "
                                     "continue with start_step at this number and zeros as noise."),
                TABLE,
                io.Latent.Input("noise", optional=True,
                                tooltip="Initial noise instead of the one from the seed: standard normal, with the "
                                        "shape of the latent. Zeros: the latent is already noisy."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent, for VAE Decode."),
                Report.Output(display_name="report", tooltip="Ranges, clipped values, NaN and Inf at each step, for "
                                                             "Sampling Report."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, steps, cfg, eta, spacing, guidance_rescale, denoise,
                image_cfg, clip_x0, clip_value, recompute_eps, start_step, end_step, tables,
                noise=None) -> io.NodeOutput:
        steps, cfg = own_settings(model, steps, cfg)
        settings = DDIMSettings(steps, cfg, eta, spacing, guidance_rescale, denoise, image_cfg,
                                Clip(clip_x0, clip_value, recompute_eps), start_step, end_step, tables)
        callback = step_preview(model, steps)
        with memory_advice(f"while sampling a latent of {tuple(latent['samples'].shape)}", LESS_MEMORY):
            samples, report = sample_latent(model, positive, negative, latent, seed, settings,
                                            None if noise is None else noise["samples"], callback=callback)
        return io.NodeOutput(samples, report)


class DDIMSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_DDIMSamplerSelect",
            display_name="DDIM Sampler Select",
            category="Stillmotion/sampling",
            description="The same sampler for SamplerCustomAdvanced: connect both outputs; cfg and seed come from "
                        "there. Guidance rescale works with any guider.",
            search_aliases=["ksampler select", "ddim sampler advanced", "sampler custom", "ddim sigmas"],
            advanced=["spacing", "guidance_rescale", "denoise", "clip_x0", "clip_value", "recompute_eps", "tables"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with: its schedule is read here."),
                STEPS, ETA, SPACING, RESCALE, DENOISE, CLIP, CLIP_VALUE, RECOMPUTE, TABLE,
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced or SamplerCustom."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The sampler's own timesteps. Split Sigmas works on "
                                                                "them."),
            ],
        )

    @classmethod
    def execute(cls, model, steps, eta, spacing, guidance_rescale, denoise, clip_x0, clip_value, recompute_eps,
                tables) -> io.NodeOutput:
        steps, _ = own_settings(model, steps, 1.0)
        settings = DDIMSettings(steps, 1.0, eta, spacing, guidance_rescale, denoise, 0.0,
                                Clip(clip_x0, clip_value, recompute_eps), 0, steps, tables)
        return io.NodeOutput(*make_sampler(model, settings))


class SamplingReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_SamplingReport",
            display_name="Sampling Report",
            category="Stillmotion/sampling",
            description="Draws what happened at each sampling step and says whether the result can be good.",
            search_aliases=["nan", "x0 statistics", "plot sampling", "debug sampler"],
            inputs=[Report.Input("report", tooltip="From DDIM Sampler (fixed).")],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Ranges of predicted x0 and latent, and clipped values, "
                                                             "over the steps."),
                io.String.Output(display_name="text", tooltip="Verdict (good, doubtful, bad) with reason and advice, "
                                                              "then the numbers of each step."),
                io.Boolean.Output(display_name="passed", tooltip="False only if the verdict is bad."),
            ],
        )

    @classmethod
    def execute(cls, report) -> io.NodeOutput:
        return io.NodeOutput(as_images(draw_report(report)), report.text(), report.verdict()[0] != "bad")
