"""One module a family of networks. A new one: its module here, with what `registry` asks of it, and a line here."""

# module: class of its MODEL
FAMILIES = {
    "video_unet": "VideoUNetModel",
    "dynamicrafter": "DynamiCrafterModel",
    "causal_wan": "CausalWanModel",
}
