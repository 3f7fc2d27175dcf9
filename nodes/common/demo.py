"""The small demo models included in the pack."""
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "demo"
DYNAMICRAFTER_96 = FOLDER / "dynamicrafter_96_demo.safetensors"
DYNAMICRAFTER = FOLDER / "dynamicrafter_demo.safetensors"  # 64x64; includes the VAE and towers shared by those below
DYNAMICRAFTER_DEMOS = {"demo, 96x96": DYNAMICRAFTER_96, "demo": DYNAMICRAFTER}  # as Load DynamiCrafter offers them
CAUSAL_WAN = FOLDER / "causal_wan_demo.safetensors"
VIDEO_UNET = FOLDER / "video_unet_demo.safetensors"
VIDEO_UNET_EARLY = FOLDER / "video_unet_early.safetensors"  # stopped early in training
SIZE = (64, 64)  # width and height in pixels that the models with DYNAMICRAFTER's encoders were trained with
TRAINED_SIZE = "stillmotion_trained_size"  # entry of a conditioning: that of the model whose text encoder made it


def other_encoders(model, conditioning) -> str:
    """A note for a demo model without encoders of its own if the prompt comes from those of another model; else ""."""
    known = getattr(model.model, "demo_size", None)
    size = conditioning[0][1].get(TRAINED_SIZE) if conditioning else None
    if None in (known, size) or known == size:
        return ""
    return (f"The prompt comes from the CLIP of a model for {size[0]} x {size[1]}, but this demo model was trained "
            f"with that of the one for {known[0]} x {known[1]}, so the video will fall apart. Set the checkpoint in "
            "Load DynamiCrafter to demo: this model needs its CLIP, CLIP vision and VAE.")
