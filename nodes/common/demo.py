"""The small demo models included in the pack."""
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "demo"
DYNAMICRAFTER_96 = FOLDER / "dynamicrafter_96_demo.safetensors"
DYNAMICRAFTER = FOLDER / "dynamicrafter_demo.safetensors"  # 64x64
DYNAMICRAFTER_DEMOS = {"demo, 96x96": DYNAMICRAFTER_96, "demo": DYNAMICRAFTER}  # as Load DynamiCrafter offers them
SIZES = {"demo, 96x96": (96, 96), "demo": (64, 64)}  # width and height in pixels that they were trained with
# The models below have no encoders of their own, but those of "demo, 96x96"; VIDEO_UNET_EARLY those of "demo".
CAUSAL_WAN = FOLDER / "causal_wan_demo.safetensors"
VIDEO_UNET = FOLDER / "video_unet_demo.safetensors"
VIDEO_UNET_EARLY = FOLDER / "video_unet_early.safetensors"  # stopped early in training
TRAINED_SIZE = "stillmotion_trained_size"  # entry of a conditioning: that of the model whose text encoder made it


def demo_of(model) -> str | None:
    """The demo of Load DynamiCrafter whose encoders a MODEL was trained with, None if it is of no demo, or is None."""
    inner = getattr(model, "model", None)
    named, size = (getattr(inner, name, None) for name in ("encoders_of", "trained_size"))
    return named if named in SIZES else next((name for name in SIZES if SIZES[name] == size), None)


def other_encoders(model, conditioning) -> str:
    """A note for a model that was trained with the encoders of a demo if the prompt comes from those of another one;
    else ""."""
    known = demo_of(model)
    size = conditioning[0][1].get(TRAINED_SIZE) if conditioning else None
    if size is None or known is None or SIZES[known] == size:
        return ""
    return (f"The prompt comes from the CLIP of a model for {size[0]} x {size[1]}, but this model was trained with the "
            f"one for {SIZES[known][0]} x {SIZES[known][1]}, so the video will fall apart. Set the checkpoint in Load "
            f"DynamiCrafter to \"{known}\": this model needs its CLIP (and CLIP vision and VAE, where used).")
