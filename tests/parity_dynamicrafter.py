"""The DynamiCrafter cases of parity.py: prompts and pictures to the decoded video."""
from pathlib import Path

START, END, PADDING = 49406, 49407, 0  # in CLIP's vocabulary


def prompts(clip, case: dict) -> dict:
    """Tokens and embeddings of the prompt and the empty prompt; the official code has no prompt weights (brackets)."""
    import torch
    tokens = [clip.tokenize(text, disable_weights=True) for text in (case["prompt"], "")]
    for text in tokens:
        name, chunks = next(iter(text.items()))
        if len(chunks) > 1:  # and it truncates a prompt that is too long
            words = [token for chunk in chunks for token in chunk if token[0] not in (START, END, PADDING)]
            text[name] = [[(START, 1.0), *words[:75], (END, 1.0)]]
    ids = torch.tensor([[token[0] for token in chunk] for text in tokens for chunk in text[next(iter(text))]])
    positive, negative = (clip.encode_from_tokens(text) for text in tokens)
    return {"tokens": ids, "text_emb": positive, "text_emb_empty": negative}


def images(loaded, case: dict, given: dict) -> dict:
    """Vision tokens, image context and condition frames for the case's pictures."""
    from stillmotion.nodes.dynamicrafter.conditioning import encode_images, image_conditions
    start, end = (given[name].movedim(0, -1)[None] for name in ("image", "image_end"))
    mode = "interpolate" if case["interp"] else "loop" if case["loop"] else "animate"
    latent, tokens, grey = image_conditions(loaded.clip_vision, loaded.vae, start, end if case["interp"] else None,
                                            mode, case["W"], case["H"], case["T"], 1)
    network, base = loaded.model.model.diffusion_model, loaded.model.model
    first = encode_images(loaded.vae, start)
    return {
        "condition": latent, "clip_image_tokens": tokens, "clip_image_tokens_uncond": grey,
        "image_emb": network.image_proj_model(tokens), "image_emb_uncond": network.image_proj_model(grey),
        "vae_mean": first, "z": base.process_latent_in(first), "c_concat": base.process_latent_in(latent),
    }


def network_outputs(loaded, case: dict, given: dict, ours: dict) -> dict:
    """The denoising network alone, at three timesteps."""
    import torch
    x = torch.cat((given["x_T"], ours["c_concat"]), dim=1)
    network = loaded.model.model.diffusion_model
    return {f"unet_out_t{t}": network(x, torch.tensor([t]), ours["text_emb"], image_tokens=ours["clip_image_tokens"],
                                      frame_stride=torch.tensor([case["fs"]])) for t in (999, 500, 1)}


def sampling_run(loaded, case: dict, given: dict, ours: dict, eta: int) -> dict:
    """A full run of the sampler with the recorded noise injected, and its decoded video."""
    import torch
    from stillmotion.nodes.ddim.sampler import DDIMSettings, make_sampler, sample_latent
    from stillmotion.nodes.ddim.schedule import make_timesteps
    from stillmotion.nodes.ddim.step import Clip
    shared = {"concat_latent_image": ours["condition"], "frame_stride": case["fs"]}
    positive = [[ours["text_emb"], {**shared, "image_tokens": ours["clip_image_tokens"]}]]
    negative = [[ours["text_emb_empty"], {**shared, "image_tokens": ours["clip_image_tokens_uncond"]}]]
    fixed, official = (make_timesteps(case["steps"], case["spacing"], original) for original in (False, True))
    settings = DDIMSettings(
        steps=case["steps"], cfg=case["cfg"], eta=float(eta), spacing=case["spacing"],
        guidance_rescale=case["rescale"], denoise=1.0, image_cfg=case["multi"] or 0.0, clip=Clip("off", 3.0, False),
        start_step=0, end_step=1000, tables="fixed" if fixed == official else "original")
    predicted = []
    noise = given[f"eta{eta}_noise"]
    latent, _ = sample_latent(
        loaded.model, positive, negative, {"samples": torch.zeros_like(ours["condition"])}, 0, settings,
        start_noise=given["x_T"], noise=lambda step: noise[step],
        callback=lambda step, x0, x, steps: predicted.append(x0.clone()))
    tables = make_sampler(loaded.model, settings)[0].tables
    video = loaded.vae.decode(latent["samples"]).movedim(-1, 1) * 2 - 1
    return {
        "ddim_timesteps": torch.tensor(tables.timesteps), f"eta{eta}_sigmas": tables.sigmas,
        f"eta{eta}_alphas": tables.alphas, f"eta{eta}_alphas_prev": tables.alphas_prev,
        f"eta{eta}_pred_x0": torch.stack(predicted),
        f"eta{eta}_latent": loaded.model.model.process_latent_in(latent["samples"]), f"eta{eta}_video": video,
    }


def schedule(loaded, expected: dict) -> dict:
    """The float64 schedule, and the official timestep tables as reproduced by the `original` setting."""
    import torch
    from stillmotion.nodes.ddim.schedule import make_alphas_cumprod, make_scale_arr, make_timesteps
    params = loaded.model.model.diffusion_params
    out = {"alphas_cumprod": make_alphas_cumprod(params)}
    if params.base_scale is not None:
        out["scale_arr"] = make_scale_arr(params.base_scale)
    for name in expected:
        if name.startswith("timesteps_"):
            _, spacing_and_steps = name.split("_", 1)
            spacing, steps = spacing_and_steps.rsplit("_", 1)
            out[name] = torch.tensor(make_timesteps(int(steps), spacing, original=True))
    return out


def run_case(folder: Path, case: dict) -> dict:
    """The pack's result and the recorded one, for every recorded tensor of one case."""
    import torch
    from safetensors.torch import load_file
    from stillmotion.nodes.common.files import read_checkpoint
    from stillmotion.nodes.dynamicrafter import checkpoint
    expected = load_file(folder / "expected.safetensors")
    injected = {"image", "image_end", "x_T", "eta0_noise", "eta1_noise"}
    given = {name: expected.pop(name) for name in injected}
    loaded = checkpoint.load(read_checkpoint(folder / "model.safetensors"), "auto", "fp32", folder / "config.yaml")
    with torch.inference_mode():
        ours = prompts(loaded.clip, case) | images(loaded, case, given) | schedule(loaded, expected)
        ours |= network_outputs(loaded, case, given, ours)
        for eta in (0, 1):
            ours |= sampling_run(loaded, case, given, ours, eta)
    expected.pop("vae_logvar")  # the pack uses the posterior mean
    return {name: (ours[name], comparable(name, tensor, ours[name])) for name, tensor in sorted(expected.items())}


def comparable(name, expected, ours):
    """The recorded tensor in the form the pack computes."""
    if name in ("vae_mean", "z"):  # recorded for every frame; the pack encodes the start image once
        expected = expected[:1] if name == "vae_mean" else expected[:, :, 0]
    if name.endswith("_video"):  # ComfyUI clamps images to 0..1
        expected = expected.clamp(-1, 1)
    if name.startswith("clip_image_tokens"):
        expected = expected.reshape(ours.shape)
    return expected
