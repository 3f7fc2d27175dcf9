"""The small demo models included in the pack."""
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "demo"
DYNAMICRAFTER = FOLDER / "dynamicrafter_demo.safetensors"  # includes the VAE and towers shared by the other demos
CAUSAL_WAN = FOLDER / "causal_wan_demo.safetensors"
VIDEO_UNET = FOLDER / "video_unet_demo.safetensors"
VIDEO_UNET_EARLY = FOLDER / "video_unet_early.safetensors"  # stopped early in training
