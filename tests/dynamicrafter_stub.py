"""A small DynamiCrafter with random weights as a MODEL, and what the tests need around it."""
import torch
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.ddim.step import Clip
from stillmotion.nodes.ddim.schedule import DiffusionParams
from stillmotion.nodes.dynamicrafter import base
from stillmotion.nodes.dynamicrafter.resampler import ResamplerParams
from stillmotion.nodes.dynamicrafter.unet import UNetParams, VideoUNet
from stillmotion.nodes.ddim.sampler import DDIMSettings, sample_latent

RESAMPLER = ResamplerParams(dim=16, depth=1, dim_head=8, heads=2, num_queries=4, embedding_dim=24, output_dim=16,
                            ff_mult=2, video_length=4)
UNET = UNetParams(in_channels=8, out_channels=4, model_channels=32, attention_resolutions=(1, 2), num_res_blocks=1,
                  channel_mult=(1, 2), num_head_channels=8, transformer_depth=1, context_dim=16,
                  image_cross_attention_scale_learnable=False, default_fs=7, resampler=RESAMPLER)
DIFFUSION = DiffusionParams(parameterization="v", linear_start=0.00085, linear_end=0.012, zero_snr=True,
                            base_scale=0.7, spacing="uniform_trailing", guidance_rescale=0.7)


def weights():
    generator = torch.Generator().manual_seed(0)
    network = VideoUNet(UNET, torch.nn, torch_attention, device="meta")
    return {key: torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5 if value.ndim > 1
            else torch.full(value.shape, float(key.endswith("weight")))
            for key, value in network.state_dict().items()}  # as large out as in: every branch has its say


def make(given=None):
    model = base.make_model(UNET, DIFFUSION, 0.18215, torch.float32)
    model.diffusion_model.load_state_dict(given or weights(), assign=True)
    return base.make_patcher(model)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(frames=4, height=8, width=8, words=77, clips=1):
    shared = {"concat_latent_image": draw(clips, 4, frames, height, width), "frame_stride": 5}
    return ([[draw(1, words, 16, seed=2), {**shared, "image_tokens": draw(1, 5, 24, seed=3)}]],
            [[draw(1, 77, 16, seed=4), {**shared, "image_tokens": draw(1, 5, 24, seed=5)}]])


def sample(model, conds, steps=3, **changes):
    settings = DDIMSettings(**{
        "steps": steps, "cfg": 4.0, "eta": 1.0, "spacing": "auto", "guidance_rescale": -1.0, "denoise": 1.0,
        "image_cfg": 0.0, "clip": Clip("off", 3.0, False), "start_step": 0, "end_step": 1000, "tables": "fixed",
        **changes})
    shape = conds[0][0][1]["concat_latent_image"].shape
    with torch.inference_mode():
        return sample_latent(model, *conds, {"samples": torch.zeros(shape)}, 3, settings)[0]["samples"]


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()
