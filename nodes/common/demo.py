"""The small demo models included in the pack."""
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "demo"
DYNAMICRAFTER_96 = FOLDER / "dynamicrafter_96_demo.safetensors"
DYNAMICRAFTER = FOLDER / "dynamicrafter_demo.safetensors"  # 64x64; includes the VAE and towers shared by those below
DYNAMICRAFTER_DEMOS = {"demo, 96x96": DYNAMICRAFTER_96, "demo": DYNAMICRAFTER}  # as Load DynamiCrafter offers them
CAUSAL_WAN = FOLDER / "causal_wan_demo.safetensors"
VIDEO_UNET = FOLDER / "video_unet_demo.safetensors"
VIDEO_UNET_EARLY = FOLDER / "video_unet_early.safetensors"  # stopped early in training
