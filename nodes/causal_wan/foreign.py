"""Checkpoints that are not causal Wan, recognised by their keys: what each is, and what to use instead."""
from __future__ import annotations

NATIVE = "Use the same model in Wan's own key layout (blocks.0.self_attn.q.weight), .safetensors or the original .pt."
DIFFUSION = "Use core's Load Diffusion Model for this file."

# The first match wins; a key that contains the marker identifies the family.
FOREIGN = (
    ("a model with an unmerged LoRA (PEFT)", ".base_layer.",
     "Use the merged file of the same model."),
    ("a LoRA", "lora_", "Choose it under lora, and the model that it was made for under checkpoint."),
    ("a LoRA", ".lora.", "Choose it under lora, and the model that it was made for under checkpoint."),
    ("Wan in the layout of diffusers", "condition_embedder.", NATIVE),
    ("DynamiCrafter", "image_proj_model.", "Use Load DynamiCrafter."),
    ("a Wan VAE", "decoder.middle.0.residual.", "Use core's Load VAE."),
    ("a VAE", "decoder.conv_in.", "Use core's Load VAE."),
    ("a text encoder (UMT5)", "token_embedding.weight", "Use core's Load CLIP, type wan."),
    ("a text encoder (UMT5)", "encoder.block.0.layer.0.SelfAttention.", "Use core's Load CLIP, type wan."),
    ("a CLIP vision tower", "vision_model.", "Use core's Load CLIP Vision."),
    ("HunyuanVideo", "txt_in.individual_token_refiner.", DIFFUSION),
    ("Flux", "double_blocks.0.img_attn.", DIFFUSION),
    ("LTX-Video", "transformer_blocks.0.scale_shift_table", DIFFUSION),
    ("Stable Diffusion 3", "joint_blocks.0.", DIFFUSION),
    ("Stable Diffusion", "input_blocks.0.0.", "Use core's Load Checkpoint."),
)

# Wan variants with additional parts; a key that starts with the marker identifies it.
EXTENDED = (
    ("Wan VACE", "vace_"),
    ("Wan Camera Control", "control_adapter."),
    ("Wan Sound to Video", "casual_audio_encoder."),
    ("HuMo", "audio_proj."),
    ("Wan Animate", "face_adapter."),
    ("Wan Fun-Control with a reference image", "ref_conv."),
    ("Wan First-Last-Frame to Video", "img_emb.emb_pos"),
)

def check_family(path, tensors):
    """Raise ValueError, saying what was found and what to use, for anything but plain Wan weights (native keys)."""
    wan = "patch_embedding.weight" in tensors and "head.modulation" in tensors
    extended = next((name for name, mark in EXTENDED if any(key.startswith(mark) for key in tensors)), None)
    if wan and extended:
        raise ValueError(f"{path} is {extended}: it needs inputs that the block-autoregressive sampler does not have. "
                         f"Use a causal Wan 2.1 (Self-Forcing, Causal-Forcing, LongLive 1.0). {DIFFUSION}")
    found = next(((name, use) for name, mark, use in FOREIGN if any(mark in key for key in tensors)), None)
    if found:
        raise ValueError(f"{path} is not a causal Wan model: it looks like {found[0]}. {found[1]}")
    if not wan:
        missing = " and ".join(key for key in ("patch_embedding.weight", "head.modulation") if key not in tensors)
        raise ValueError(f"{path} is not a complete Wan model: it lacks {missing} (its keys: "
                         f"{', '.join(list(tensors)[:3])}, ...). Use a causal Wan 2.1, .safetensors or the original "
                         ".pt.")
