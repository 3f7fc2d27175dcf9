"""One module per model family. To add a family, add a module with what `registry` requires, and an entry here."""

# module: class of its MODEL; a VAE has none
FAMILIES = {
    "video_unet": "VideoUNetModel",
    "dynamicrafter": "DynamiCrafterModel",
    "causal_wan": "CausalWanModel",
    "vae": None,
}

# settings whose defaults differ for a family
DEFAULTS = {"vae": {"learning_rate": 1e-3, "batch_size": 8, "steps": 2000}}
