"""A small untrained video U-Net, and helpers for the tests."""
import torch
from stillmotion.nodes.common.files import Checkpoint
from stillmotion.nodes.video_unet import checkpoint as loader
from stillmotion.nodes.video_unet.config import HEADER, VideoUNetConfig, to_json
from stillmotion.nodes.video_unet.unet import VideoUNet, VideoUNetParams, new_network


def make_params(**changes) -> VideoUNetParams:
    sizes = {"channels": 4, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1,
             "spatial_attention": (1,), "head_channels": 8, "context_dim": 32, "additional_condition_dim": 0}
    return VideoUNetParams(**sizes | changes)


def make_config(params=None, **changes) -> VideoUNetConfig:
    values = {"params": params or make_params(), "schedule": "cosine", "prediction": "v", "frames": 6, "height": 64,
              "width": 64, "space": "latent", "scale_factor": 0.5, "spatial_factor": 8, "temporal_factor": 1,
              "text_encoder": "demo"}
    return VideoUNetConfig(**values | changes)


def random_network(params, seed=1):
    """Initialized as for training, but with no layer at zero."""
    net = new_network(params, seed)
    generator = torch.Generator().manual_seed(seed)
    for value in net.parameters():
        if not value.any():
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return net


def as_checkpoint(net, config) -> Checkpoint:
    return Checkpoint("test.safetensors", {key: value.clone() for key, value in net.state_dict().items()},
                      {HEADER: to_json(config)})


def make_model(config=None, network=None, **changes):
    """A MODEL wrapping a small network."""
    config = config or make_config(**changes)
    return loader.load(as_checkpoint(network or random_network(config.params), config), "fp32")


class LoudnessUNet(VideoUNet):
    """Another kind of condition: loudness over time [B, S], with its own encoder."""

    def __init__(self, params, operations, attention, dtype=None, device=None):
        super().__init__(params, operations, attention, dtype, device)
        self.listen = operations.Conv1d(1, params.model_channels * 4, 5, padding=2, dtype=dtype, device=device)

    def embed(self, t_B, additional_BD, dtype):
        emb_BE = super().embed(t_B, None, dtype)
        if additional_BD is None:
            return emb_BE
        return emb_BE + self.listen(additional_BD[:, None].to(dtype)).mean(-1)
