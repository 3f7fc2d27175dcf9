"""The causal Wan cases of parity.py: the block loop with the noise of a recorded run."""
from pathlib import Path


def official_switches(blocks: tuple[int, ...], frames: list[int]) -> tuple[int, ...]:
    """First frames of the blocks at which the official loop switches the prompt: at most once per block, never after
    the last. (The pack uses the latest of several prompts that start within one block.)"""
    starts = [sum(blocks[:index]) for index in range(len(blocks))]
    found = []
    for frame in frames:
        later = [start for start in starts if start >= frame and (not found or start > found[-1])]
        if not later:
            break
        found.append(later[0])
    return tuple(found)


def make_plan(case: dict):
    """The settings of a case in the pack's terms; a missing or null setting is the official default."""
    from stillmotion.nodes.causal_wan.blocks import Plan, split_frames
    from stillmotion.nodes.causal_wan.schedule import make_steps
    stated = {name: value for name, value in case.items() if value is not None}
    steps = make_steps(stated["steps"], stated.get("shift", 5.0), warp=True)
    given, block = int(stated.get("init", 0)), stated["block"]
    blocks = split_frames(given, block, given % block == 1, False) if given else ()
    blocks += split_frames(stated["frames"] - given, block, False, False)
    return Plan(blocks=blocks, steps=steps, first_steps=steps, context_noise=float(stated.get("ctx", 0)),
                window=stated.get("local", -1), sink=stated.get("sink", 0), endless=False,
                switches=official_switches(blocks, stated.get("switch", [])),
                global_sink=stated.get("global_sink", True), cfg=1.0)


def official_cache():
    """LongLive 1.0's cache class, which writes each sink frame only once: if a block after the first reaches into the
    sink, its noisiest step determines the entry. (The pack writes it in every step, like all other frames.)"""
    import torch
    from stillmotion.nodes.causal_wan.cache import KVCache

    class WriteOnceCache(KVCache):
        end = 0  # end of the frames seen so far

        def __init__(self, layout, *given):
            super().__init__(layout, *given)
            # one more frame, to which nothing attends, for what is not to be written
            self.layers = tuple(layer._replace(**{name: torch.cat((ring, ring[:, :layout.frame_tokens]), dim=1)
                                                  for name, ring in zip(layer._fields[:2], layer)})
                                for layer in self.layers)

        def open(self, frame_ids, sink_mode, *size):
            window = super().open(frame_ids, sink_mode, *size)
            again, self.end = frame_ids[-1] < self.end, max(self.end, frame_ids[-1] + 1)
            if not again or frame_ids[0] == 0 or sink_mode == "replace":
                return window
            slots = window.slots_F
            return window._replace(slots_F=slots.where(slots >= self.layout.sink, self.layout.capacity))

    return WriteOnceCache


def recorded_noise(plan, given: dict):
    """The start noise by frame, and the step noise in the order it was drawn."""
    start_noise = given["noise"].transpose(1, 2)
    step_noise = iter(given["step_noise"].transpose(2, 3))
    first = plan.frames - start_noise.shape[2]

    def noise(start: int, count: int, step: int):
        return start_noise[:, :, start - first:start - first + count] if step == 0 else next(step_noise)

    return noise


def run_case(folder: Path, case: dict) -> dict:
    """The pack's result and the recorded one, for every recorded tensor of one case."""
    import torch
    from safetensors.torch import load_file
    from stillmotion.nodes.causal_wan import checkpoint
    from stillmotion.nodes.causal_wan.blocks import BlockLoop
    from stillmotion.nodes.causal_wan.schedule import make_sigmas
    from stillmotion.nodes.common.files import read_checkpoint
    recorded = load_file(folder / "expected.safetensors")
    results = {"denoising_timesteps", "sigmas", "first_flow", "latents"}
    expected = {name: recorded.pop(name) for name in results}
    loaded = checkpoint.load(read_checkpoint(folder / "model.safetensors"), "auto", "fp32")
    network, plan = loaded.model.diffusion_model, make_plan(case)
    context = recorded["initial_latent"].transpose(1, 2) if case.get("init") else None
    given = 0 if context is None else context.shape[2]
    batch, (height, width) = recorded["noise"].shape[0], recorded["noise"].shape[3:]
    cache = official_cache()(plan.layout(network.params, height, width), batch, torch.float32, "cpu")
    flows = []

    def evaluate(x, t, keys, frame_ids, cache, sink_mode):
        flows.append(network(x, t, keys, frame_ids=frame_ids, cache=cache, sink_mode=sink_mode))
        return flows[-1]

    with torch.inference_mode():
        prompts = [network.project_context(recorded[f"text_emb_{index}"], recorded.get("clip_fea"))
                   for index in range(1 + len(plan.switches))]
        loop = BlockLoop(plan=plan, evaluate=evaluate, caches=[cache], project=lambda prompt: [prompts[prompt]],
                         noise=recorded_noise(plan, recorded), y_BYFHW=recorded.get("y"), on_step=lambda *_: None)
        latents = [block.latent_BCFHW for block in loop.run(context, None, None)]
        ours = {"latents": torch.cat(([] if context is None else [context]) + latents, dim=2).transpose(1, 2),
                "first_flow": flows[plan.leading_blocks(given)].transpose(1, 2),
                "denoising_timesteps": torch.tensor([step.timestep for step in plan.steps]),
                "sigmas": make_sigmas(case.get("shift") or 5.0)}
    return {name: (ours[name], tensor) for name, tensor in sorted(expected.items())}
