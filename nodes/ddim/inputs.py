"""Checks on what is wired into a sampler, so that a mistake ends in a sentence and not in a tensor error."""
import torch


def check_inputs(model, positive, negative, latent: dict, start_noise: torch.Tensor | None, image_cfg: float) -> None:
    """Raise ValueError unless model, CONDITIONING, LATENT and start noise fit together."""
    samples = latent["samples"]
    _check_latent(samples, model.get_model_object("latent_format"))
    if start_noise is not None and (start_noise.shape != samples.shape or not start_noise.isfinite().all()):
        raise ValueError(f"The start noise is {_shape(start_noise)} and has to be finite and of the latent's shape, "
                         f"{_shape(samples)}.")
    for name, conditioning in (("positive", positive), ("negative", negative)):
        if not conditioning:
            raise ValueError(f"The {name} conditioning is empty: wire one from DynamiCrafter Image to Video.")
        for _, values in conditioning:
            _check_condition_image(name, values.get("concat_latent_image"), samples)
    has_tokens = [all("image_tokens" in values for _, values in c) for c in (positive, negative)]
    if has_tokens == [True, False] or has_tokens == [False, True]:
        missing = "negative" if has_tokens[0] else "positive"
        raise ValueError(f"The {missing} conditioning has no image tokens, the other one has: take both positive and "
                         "negative from DynamiCrafter Image to Video.")
    if image_cfg != 0 and not has_tokens[0]:
        raise ValueError(f"image_cfg is {image_cfg:g}, but the conditioning holds no image to guide by: take it from "
                         "DynamiCrafter Image to Video, or set image_cfg to 0.")


def _check_latent(samples, latent_format):
    video = latent_format.latent_dimensions == 3
    remedy = "use the latent of DynamiCrafter Image to Video" if video else "use its own latent"
    expected = f"[batch, {latent_format.latent_channels}, {'frames, ' if video else ''}height, width]"
    fits = samples.ndim == latent_format.latent_dimensions + 2 and samples.shape[1] == latent_format.latent_channels
    if not fits or samples.is_nested:
        raise ValueError(f"The latent is {_shape(samples)}, this model takes {expected}. It seems to belong to another "
                         f"model: {remedy}.")
    if 0 in samples.shape:
        raise ValueError(f"The latent is empty: {_shape(samples)}.")
    bad = samples.numel() - int(samples.isfinite().sum())
    if bad:
        raise ValueError(f"The latent holds {bad} NaN or Inf values of {samples.numel()}: look for the cause before "
                         "the sampler (a VAE in fp16, or an earlier sampler; Sampling Report shows it).")


def _check_condition_image(name, image, samples):
    if image is None:
        return
    if image.shape[2:] != samples.shape[2:]:
        raise ValueError(f"The {name} conditioning was made for frames x height x width {_shape(image[0, 0])} (latent "
                         f"size), the latent has {_shape(samples[0, 0])}: take both from the same DynamiCrafter Image "
                         "to Video node.")
    if samples.shape[0] % image.shape[0]:
        raise ValueError(f"The {name} conditioning holds {image.shape[0]} images, the latent a batch of "
                         f"{samples.shape[0]}: give one image, or as many as the batch.")


def _shape(tensor):
    return " x ".join(map(str, tensor.shape)) or "a single number"
