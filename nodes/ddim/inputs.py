"""Checks on the inputs of a sampler, so that a mistake gives a clear message instead of a tensor error."""
import torch

SOURCE = "the conditioning node of this model (DynamiCrafter Image to Video, Video U-Net Conditions, ...)"


def check_inputs(model, positive, negative, latent: dict, start_noise: torch.Tensor | None, image_cfg: float) -> None:
    """Raise ValueError unless model, CONDITIONING, LATENT and start noise fit together."""
    samples = latent["samples"]
    _check_latent(samples, model.get_model_object("latent_format"))
    if start_noise is not None and (start_noise.shape != samples.shape or not start_noise.isfinite().all()):
        broken = "" if start_noise.isfinite().all() else " with NaN or Inf values"
        raise ValueError(f"The start noise is {_shape(start_noise)}{broken}. It must be finite and have the latent's "
                         f"shape, {_shape(samples)}. Make it for this latent, or disconnect it.")
    for name, conditioning in (("positive", positive), ("negative", negative)):
        if not conditioning:
            raise ValueError(f"The {name} conditioning is empty. Connect the one from {SOURCE}.")
        for _, values in conditioning:
            _check_condition_image(name, values.get("concat_latent_image"), samples)
    has_tokens = [all("image_tokens" in values for _, values in c) for c in (positive, negative)]
    if has_tokens == [True, False] or has_tokens == [False, True]:
        missing = "negative" if has_tokens[0] else "positive"
        raise ValueError(f"The {missing} conditioning has no image tokens, but the other one has. Connect both "
                         f"positive and negative from {SOURCE}.")
    if image_cfg != 0 and not has_tokens[0]:
        raise ValueError(f"image_cfg is {image_cfg:g}, but the conditioning holds no image tokens. Set image_cfg to 0, "
                         "or connect a conditioning with an image (DynamiCrafter has one, Video U-Net does not).")


def _check_latent(samples, latent_format):
    video = latent_format.latent_dimensions == 3
    expected = f"[batch, {latent_format.latent_channels}, {'frames, ' if video else ''}height, width]"
    fits = samples.ndim == latent_format.latent_dimensions + 2 and samples.shape[1] == latent_format.latent_channels
    if not fits or samples.is_nested:
        raise ValueError(f"The latent is {_shape(samples)}, but this model takes {expected}. Use the latent from "
                         f"{SOURCE}.")
    if 0 in samples.shape:
        raise ValueError(f"The latent is empty: {_shape(samples)}. Every size must be at least 1.")
    bad = samples.numel() - int(samples.isfinite().sum())
    if bad:
        raise ValueError(f"{bad} of the latent's {samples.numel()} values are NaN or Inf. The cause is a node before "
                         "the sampler (a VAE in fp16, or an earlier sampler: check it with Sampling Report).")


def _check_condition_image(name, image, samples):
    if image is None:
        return
    if image.shape[2:] != samples.shape[2:]:
        raise ValueError(f"The {name} conditioning was made for frames x height x width {_shape(image[0, 0])} (latent "
                         f"size), but the latent has {_shape(samples[0, 0])}. Connect both from the same conditioning "
                         "node.")
    if samples.shape[0] % image.shape[0]:
        raise ValueError(f"The {name} conditioning holds {image.shape[0]} images, but the latent is a batch of "
                         f"{samples.shape[0]}. Give one image, or as many as the batch.")


def _shape(tensor):
    return " x ".join(map(str, tensor.shape)) or "a single number"
