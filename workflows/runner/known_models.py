"""Published files of the models that this pack runs: where they are, and where they go. README and models.md tell more.

A sha256 is given where ComfyUI's own templates state it; for the others the host tells it when a download starts.
"""

from collections import namedtuple

# repository and path on the model host; folder in ComfyUI's models; name there; about so many GB, None: not known
File = namedtuple("File", "repository path folder name gigabytes sha256", defaults=[None])

WAN = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
LONGLIVE = "Efficient-Large-Model/LongLive-1.3B"


def dynamicrafter(name, repository):
    return File(repository, "model.ckpt", "checkpoints", f"dynamicrafter_{name}.ckpt", 10.4)


def pruned(name):
    file = f"dynamicrafter_{name}_fp16_pruned.safetensors"
    return File("Kijai/DynamiCrafter_pruned", file, "checkpoints", file, 3.1)


KNOWN = {  # name: (what it is, its files)
    "dynamicrafter_256": ("DynamiCrafter 256", [dynamicrafter("256", "Doubiiu/DynamiCrafter")]),
    "dynamicrafter_512": ("DynamiCrafter 512", [dynamicrafter("512", "Doubiiu/DynamiCrafter_512")]),
    "dynamicrafter_1024": ("DynamiCrafter 1024", [dynamicrafter("1024", "Doubiiu/DynamiCrafter_1024")]),
    "dynamicrafter_512_interp": ("DynamiCrafter 512 for interpolation and loops",
                                 [dynamicrafter("512_interp", "Doubiiu/DynamiCrafter_512_Interp")]),
    "dynamicrafter_512_pruned": ("DynamiCrafter 512, fp16, without encoders", [pruned("512")]),
    "dynamicrafter_512_interp_pruned": ("DynamiCrafter 512_interp, fp16, without encoders", [pruned("512_interp")]),
    "dynamicrafter_1024_pruned": ("DynamiCrafter 1024, fp16, without encoders", [pruned("1024")]),
    "self_forcing": ("Self-Forcing 1.3B", [
        File("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt", "diffusion_models", "self_forcing_dmd.pt",
             None)]),
    "longlive": ("LongLive 1.3B and its LoRA", [
        File(LONGLIVE, "models/longlive_base.pt", "diffusion_models", "longlive_base.pt", None),
        File(LONGLIVE, "models/lora.pt", "loras", "longlive_lora.pt", None)]),
    "causal_forcing": ("Causal-Forcing, chunk-wise", [
        File("zhuhz22/Causal-Forcing", "chunkwise/causal_forcing.pt", "diffusion_models",
             "chunkwise/causal_forcing.pt", None)]),
    "causal_forcing_framewise": ("Causal-Forcing, frame-wise", [
        File("zhuhz22/Causal-Forcing", "framewise/causal_forcing.pt", "diffusion_models",
             "framewise/causal_forcing.pt", None)]),
    "causvid": ("CausVid", [
        File("tianweiy/CausVid", "autoregressive_checkpoint/model.pt", "diffusion_models", "causvid.pt", None)]),
    "krea_realtime": ("Krea Realtime 14B", [
        File("krea/krea-realtime-video", "krea-realtime-video-14b.safetensors", "diffusion_models",
             "krea-realtime-video-14b.safetensors", None)]),
    "one_forcing": ("One-Forcing", [
        File("JiaqiFeng/OneForcing", "checkpoints/one_forcing.pt", "diffusion_models", "one_forcing.pt", None)]),
    "raven": ("RAVEN", [File("mvp-lab/RAVEN", "raven_model.pt", "diffusion_models", "raven_model.pt", None)]),
    "wan_encoders": ("text encoder and VAE for every causal Wan", [
        File(WAN, "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders",
             "umt5_xxl_fp8_e4m3fn_scaled.safetensors", 6.7,
             "c3355d30191f1f066b26d93fba017ae9809dce6c627dda5f6a66eaa651204f68"),
        File(WAN, "split_files/vae/wan_2.1_vae.safetensors", "vae", "wan_2.1_vae.safetensors", 0.25,
             "2fc39d31359a4b0a64f55876d8ff7fa8d780956ae2cb13463b0223e15148976b")]),
    "wan_clip_vision": ("CLIP ViT-H for image-to-video Wan", [
        File(WAN, "split_files/clip_vision/clip_vision_h.safetensors", "clip_vision", "clip_vision_h.safetensors", 1.3,
             "64a7ef761bfccbadbaa3da77366aac4185a6c58fa5de5f589b42a65bcc21f161")]),
}
