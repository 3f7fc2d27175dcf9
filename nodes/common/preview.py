"""Progress and a preview at each sampling step."""
import comfy.utils
import latent_preview


def step_preview(model, steps: int):
    """A sampler's callback(step, x0, x, steps), as core's. It shows a preview even where no preview method was chosen:
    ComfyUI's default is none, and a video should be seen in time to stop it."""
    latent_format = model.model.latent_format
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None and latent_format.latent_rgb_factors is not None:
        previewer = latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias,
            latent_format.latent_rgb_factors_reshape)
    bar = comfy.utils.ProgressBar(steps)

    def show(step, x0, x, total):
        bar.update_absolute(step + 1, total, previewer and previewer.decode_latent_to_preview_image("JPEG", x0))

    return show
