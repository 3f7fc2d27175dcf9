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
SCALE = 8        # pixels per latent position


def other_encoders(model, size: tuple[int, int] | None) -> str:
    """What to say of a latent or VAE for pictures of another `size` (None: unknown) at a demo model that has no
    encoders of its own; "" if all is well, or for other models."""
    known = getattr(model.model, "demo_size", None)
    if None in (known, size) or known == size:
        return ""
    return (f"The pictures are {size[0]} x {size[1]}, but this demo model was trained with {known[0]} x {known[1]}, so "
            "the video will fall apart. Set the checkpoint in Load DynamiCrafter to demo, whose CLIP, CLIP vision and "
            "VAE this model needs, and width and height to 0.")
