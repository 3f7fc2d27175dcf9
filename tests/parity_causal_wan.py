"""The causal Wan cases of parity.py: the block loop with the noise of a recorded run."""
from pathlib import Path


def load_network(path: Path, heads: int):
    """The network in float32, its sizes read from the shapes."""
    import torch
    from safetensors.torch import load_file
    from stillmotion.nodes.causal_wan.attention import torch_attention
    from stillmotion.nodes.causal_wan.model import CausalWan, WanParams
    weights = load_file(path)
    i2v = "img_emb.proj.0.weight" in weights
    params = WanParams(
        in_dim=weights["patch_embedding.weight"].shape[1], out_dim=len(weights["head.head.bias"]) // 4,
        dim=weights["head.modulation"].shape[2], ffn_dim=len(weights["blocks.0.ffn.0.bias"]), num_heads=heads,
        num_layers=sum(key.endswith("self_attn.q.bias") for key in weights),
        text_dim=weights["text_embedding.0.weight"].shape[1], freq_dim=weights["time_embedding.0.weight"].shape[1],
        i2v=i2v, clip_dim=len(weights["img_emb.proj.0.weight"]) if i2v else 0)
    network = CausalWan(params, torch.nn, torch_attention, torch.float32, "cpu")
    network.load_state_dict(weights)
    return network.eval()


def make_plan(case: dict):
    """The settings of a case as the pack states them."""
    from stillmotion.nodes.causal_wan.blocks import Plan, split_frames
    from stillmotion.nodes.causal_wan.schedule import make_steps
    steps = make_steps(case["steps"], case["shift"], warp=True)
    given = case["init"]
    blocks = (given,) * bool(given) + split_frames(case["frames"] - given, case["block"], False, False)
    return Plan(blocks=blocks, steps=steps, first_steps=steps, context_noise=float(case["ctx"]),
                window=case["local"], sink=case["sink"], endless=False, switches=tuple(case["switch"] or ()),
                global_sink=case.get("global_sink", True), cfg=1.0, freeze_sink=True)


def recorded_noise(plan, given: dict):
    """The start noise by frame and the step noise in the order in which it was drawn."""
    start_noise = given["noise"].transpose(1, 2)
    step_noise = iter(given["step_noise"].transpose(2, 3))
    first = plan.frames - start_noise.shape[2]

    def noise(start: int, count: int, step: int):
        return start_noise[:, :, start - first:start - first + count] if step == 0 else next(step_noise)

    return noise


def run_case(folder: Path, case: dict) -> dict:
    """What the pack computes and what was recorded, for every recorded tensor of one case."""
    import torch
    from safetensors.torch import load_file
    from stillmotion.nodes.causal_wan.blocks import BlockLoop
    from stillmotion.nodes.causal_wan.cache import KVCache
    from stillmotion.nodes.causal_wan.schedule import make_sigmas
    recorded = load_file(folder / "expected.safetensors")
    results = {"denoising_timesteps", "sigmas", "first_flow", "latents"}
    expected = {name: recorded.pop(name) for name in results}
    network, plan = load_network(folder / "model.safetensors", case["heads"]), make_plan(case)
    context = recorded["initial_latent"].transpose(1, 2) if case["init"] else None
    batch, (height, width) = recorded["noise"].shape[0], recorded["noise"].shape[3:]
    cache = KVCache(plan.layout(network.params, height, width), batch, torch.float32, "cpu")
    flows = []

    def evaluate(x, t, keys, frame_ids, cache, sink_mode):
        flows.append(network(x, t, keys, frame_ids, cache, sink_mode))
        return flows[-1]

    with torch.inference_mode():
        prompts = [network.project_context(recorded[f"text_emb_{index}"], recorded.get("clip_fea"))
                   for index in range(1 + len(plan.switches))]
        loop = BlockLoop(plan=plan, evaluate=evaluate, caches=[cache], project=lambda prompt: [prompts[prompt]],
                         noise=recorded_noise(plan, recorded), y_BYFHW=recorded.get("y"), on_step=lambda *_: None)
        latents = [block.latent_BCFHW for block in loop.run(context, None, None)]
        ours = {"latents": torch.cat(([] if context is None else [context]) + latents, dim=2).transpose(1, 2),
                "first_flow": flows[0 if context is None else 1].transpose(1, 2),
                "denoising_timesteps": torch.tensor([step.timestep for step in plan.steps]),
                "sigmas": make_sigmas(case["shift"])}
    return {name: (ours[name], tensor) for name, tensor in sorted(expected.items())}
