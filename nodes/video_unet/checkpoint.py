"""Files of the video U-Net: weights under the network's own keys, configuration in the header."""
from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..common.core_model import check_weight_dtype, storage_dtype
from ..common.core_nodes import make_clip_patcher
from ..common.files import Checkpoint, check_keys, check_kinds
from ..common.vae import fold_frames
from .base import make_model
from .config import HEADER, VideoUNetConfig, from_json, to_json
from .keys import PREFIX, network_tensors
from .unet import VideoUNet

log = logging.getLogger(__name__)

WEIGHT_DTYPES = ("auto", "fp32", "bf16", "fp16")


def save(path: Path, net: nn.Module, config: VideoUNetConfig, extra_metadata: dict[str, str] | None = None,
         dtype: torch.dtype = torch.float16) -> None:
    """Write the network's weights in `dtype` with the configuration and further header entries."""
    path = Path(path)
    weights = {key: value.detach().to("cpu", dtype).contiguous() for key, value in net.state_dict().items()}
    metadata = {"format": "pt", HEADER: to_json(config), **(extra_metadata or {})}
    unfinished = path.with_suffix(".tmp")
    save_file(weights, unfinished, metadata=metadata)
    unfinished.replace(path)


def read_config(checkpoint: Checkpoint) -> VideoUNetConfig:
    """The configuration from the header, or, in files of core's Save Model, from the tensor that holds it (which is
    removed). Raises ValueError for files without one."""
    text = checkpoint.metadata.get(HEADER)
    stored = checkpoint.tensors.pop(HEADER, checkpoint.tensors.pop(PREFIX + HEADER, None))
    if text is None and stored is not None:
        if stored.ndim != 1 or stored.is_complex() or not 0 < len(stored) < 100_000:
            raise ValueError(f"{checkpoint.path}: the tensor {HEADER}, which must hold the configuration as bytes, is "
                             f"{list(stored.shape)}, {stored.dtype}. The file is damaged. Get it again.")
        text = bytes(stored.to(torch.uint8).tolist()).decode(errors="replace")
    if text is None:
        raise ValueError(f"{checkpoint.path} is not a video U-Net of this pack: its header has no entry {HEADER}. Use "
                         "a file written by Train Video Model, workflows/train.py or core's Save Model, or choose "
                         "demo.")
    return from_json(text, checkpoint.path)


def preview_with(model, vae):
    """Let the previews of a small MODEL be decoded by the VAE of its latents; returns that VAE, which now takes clips.
    """
    vae, config = fold_frames(vae), model.model.video_unet
    model.model.latent_format.preview_with(vae, (config.width, config.height))
    return vae


def load(checkpoint: Checkpoint, weight_dtype: str = "auto", network: type[VideoUNet] = VideoUNet):
    """Turn a `files.Checkpoint` into ComfyUI's MODEL; `checkpoint.tensors` is emptied.

    `network`: the subclass of `VideoUNet` that the file was trained as. Raises ValueError for files of another kind,
    for a key that is missing, unknown or of another shape, and for unknown options.
    """
    check_weight_dtype(weight_dtype, WEIGHT_DTYPES)
    config = read_config(checkpoint)
    tensors = network_tensors(checkpoint.tensors)
    check_kinds(checkpoint.path, tensors)
    model = make_model(config, storage_dtype(weight_dtype, tensors), network)
    net = model.diffusion_model
    check_keys(f"network of {checkpoint.path}", tensors, {key: value.shape for key, value in net.state_dict().items()},
               "The file is damaged, or was trained as a subclass of the network: load it with that class.")
    log.info("%s: video U-Net, %.1f million parameters, %s, %s in %s, text encoder %s.", checkpoint.path,
             sum(value.numel() for value in tensors.values()) / 1e6, config.prediction, config.schedule, config.space,
             config.text_encoder)
    net.load_state_dict({key: value.to(net.dtype) for key, value in tensors.items()}, assign=True)
    return make_clip_patcher(model)
