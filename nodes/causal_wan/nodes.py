"""Nodes of the causal Wan family."""

from hashlib import sha256
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..common.files import read_checkpoint
from . import checkpoint as loader
from .lora import add_lora

DEMO = Path(__file__).parents[1] / "demo" / "causal_wan_demo.safetensors"
FOLDERS = ("diffusion_models", "checkpoints")


class LoadCausalWan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Stillmotion_LoadCausalWan",
            display_name="Load Causal Wan",
            category="Stillmotion/Causal Wan",
            description="Loads a causal Wan 2.1 model (Self-Forcing, Causal-Forcing, LongLive 1.0, CausVid, Krea "
                        "Realtime) for the Block-Autoregressive Sampler: .safetensors, or the original .pt.",
            inputs=[
                io.Combo.Input("checkpoint", options=["demo", *_names(FOLDERS)],
                               tooltip="A file in models/diffusion_models or models/checkpoints. It must be a causal "
                                       "model: ordinary Wan has the same keys and cannot be told apart, loads with a "
                                       "warning in the log at most, and its videos fall apart from block to block. "
                                       "demo is the small model that comes with this pack."),
                io.Combo.Input("weights", options=list(loader.WEIGHTS), default="auto",
                               tooltip="For .pt files that hold the weights twice. ema: averaged (Self-Forcing, "
                                       "frame-wise and long Causal-Forcing). raw: as trained (chunk-wise "
                                       "Causal-Forcing). auto: what the authors use; the log says which."),
                io.Combo.Input("lora", options=["none", *_names(("loras",))], default="none",
                               tooltip="A file in models/loras, also LongLive's lora.pt as it was published (LongLive "
                                       "needs it with longlive_base.pt). More LoRAs: core's LoRA loaders."),
                io.Float.Input("lora_strength", default=1.0, min=-20.0, max=20.0, step=0.01,
                               tooltip="1 is as trained. A LoRA that was trained with another alpha than its rank and "
                                       "does not say so in the file needs alpha / rank."),
                io.Combo.Input("weight_dtype", options=list(loader.WEIGHT_DTYPES), default="auto",
                               tooltip="How weights are stored in memory. auto: as ComfyUI decides for this device. "
                                       "fp8_e4m3fn: matrices in 8 bits, half the memory of bf16."),
            ],
            outputs=[io.Model.Output(tooltip="For Block-Autoregressive Sampler. Text, VAE and image encoder come from "
                                             "core's loaders: UMT5-XXL, Wan 2.1 VAE, CLIP ViT-H.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size)
                 for path in _paths(inputs["checkpoint"], inputs["lora"]) if path]
        return sha256(repr(files).encode()).hexdigest()  # a digest: ComfyUI saves it in the metadata of the results

    @classmethod
    def execute(cls, checkpoint, weights, lora, lora_strength, weight_dtype):
        path, lora_path = _paths(checkpoint, lora)
        model = loader.load(read_checkpoint(path), weights, weight_dtype)
        if lora_path:
            model = add_lora(model, read_checkpoint(lora_path), lora_strength)
        return io.NodeOutput(model)


def _names(folders):
    return list(dict.fromkeys(name for folder in folders for name in folder_paths.get_filename_list(folder)))


def _paths(checkpoint, lora):
    """Checkpoint and LoRA (None where none is named) as paths."""
    return (DEMO if checkpoint == "demo" else _path(FOLDERS, checkpoint),
            None if lora == "none" else _path(("loras",), lora))


def _path(folders, name):
    path = next(filter(None, (folder_paths.get_full_path(folder, name) for folder in folders)), None)
    if path is None:
        places = " or ".join(f"models/{folder}" for folder in folders)
        raise ValueError(f"There is no file {name!r} in {places}. Files there: {', '.join(_names(folders)) or 'none'}.")
    return Path(path)
