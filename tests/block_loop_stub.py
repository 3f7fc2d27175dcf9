"""A tiny causal Wan with random weights, and a slow reference for the block loop: no cache, one video at a time."""

import torch
from stillmotion.nodes.causal_wan.blocks import BlockLoop, Plan
from stillmotion.nodes.causal_wan.cache import KVCache
from stillmotion.nodes.causal_wan.model import CausalWan, WanParams
from stillmotion.nodes.causal_wan.schedule import make_steps
from stillmotion.nodes.common.attention import torch_attention

CHANNELS, HEIGHT, WIDTH, TEXT, CLIP = 3, 4, 6, 10, 14
STEPS = make_steps([1000, 500], 5.0, warp=True)


def make_network(i2v=False, layers=2):
    """Head width 12, so that all three axes have rotary embeddings."""
    params = WanParams(in_dim=2 * CHANNELS + 4 if i2v else CHANNELS, out_dim=CHANNELS, dim=24, ffn_dim=32, num_heads=2,
                       num_layers=layers, text_dim=TEXT, freq_dim=16, i2v=i2v, clip_dim=CLIP if i2v else 0)
    torch.manual_seed(0)
    return CausalWan(params, torch.nn, torch_attention, torch.float32, "cpu").eval()


def make_plan(blocks, **changes):
    settings = dict(steps=STEPS, first_steps=STEPS, context_noise=0.0, window=-1, sink=0, endless=False, switches=(),
                    global_sink=True, cfg=1.0)
    return Plan(blocks=tuple(blocks), **(settings | changes))


def make_inputs(plan, batch=1, i2v=False, seed=1):
    """Random text embeddings (prompts in order, negative last), image tokens [branch], y, and a noise function."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    noise_SBCFHW = draw(9, batch, CHANNELS, plan.frames, HEIGHT, WIDTH)
    return {"texts": [draw(batch, 5, TEXT) for _ in range(2 + len(plan.switches))],
            "images": [draw(batch, 4, CLIP) if i2v else None for _ in range(2)],
            "y": draw(batch, CHANNELS + 4, plan.frames, HEIGHT, WIDTH) if i2v else None,
            "noise": lambda start, count, step: noise_SBCFHW[step][:, :, start:start + count],
            "draw": draw}


def make_loop(network, plan, inputs, **changes):
    """The pack's loop over `network`."""
    batch = len(inputs["texts"][0])

    def project(prompt):
        texts = [inputs["texts"][prompt], inputs["texts"][-1]][:plan.branches]
        return [network.project_context(text, image) for text, image in zip(texts, inputs["images"])]

    settings = dict(plan=plan, evaluate=lambda *given: network(*given), project=project, noise=inputs["noise"],
                    caches=[KVCache(plan.layout(network.params, HEIGHT, WIDTH), batch, torch.float32, "cpu")
                            for _ in range(plan.branches)],
                    y_BYFHW=inputs["y"], on_step=lambda *_: None)
    return BlockLoop(**(settings | changes))


@torch.inference_mode()
def sample(network, plan, inputs, context=None, held=None, recall=None):
    """The latents of all generated blocks."""
    blocks = make_loop(network, plan, inputs).run(context, held, recall)
    return torch.cat([block.latent_BCFHW for block in blocks], dim=2)


def visible_frames(plan, origin=0, joined=0):
    """Mask [F, F]: a frame attends to the sink and the window that ends with its block.

    After a prompt switch frames before `origin` are masked, and all frames from there to `joined` attend to each other.
    """
    mask, end = torch.zeros(plan.frames, plan.frames, dtype=torch.bool), 0
    for count in plan.blocks:
        start, end = end, end + count
        mask[start:end, :end] = True
        if plan.window != -1:
            mask[start:end, origin + plan.sink:max(origin + plan.sink, end - (plan.window - plan.sink))] = False
    mask[:joined, origin:joined] = True
    return mask[origin:, origin:]


@torch.inference_mode()
def sample_slowly(network, plan, inputs, context=None, held=None):
    """Same result as `sample`, but every step evaluates the whole video so far, one video of the batch at a time."""
    return torch.cat([sample_video(network, plan, inputs, slice(row, row + 1), context, held)
                      for row in range(len(inputs["texts"][0]))])


def sample_video(network, plan, inputs, row, context, held):
    def hold(x, start):
        end = start if held is None else min(start + x.shape[2], held.shape[2])
        count = max(0, end - start)
        return x if not count else torch.cat((held[row, :, start:end], x[:, :, count:]), dim=2), count

    def project(prompt):
        texts = [inputs["texts"][prompt], inputs["texts"][-1]][:plan.branches]
        return [network.project_context(text[row], None if image is None else image[row])
                for text, image in zip(texts, inputs["images"])]

    prompt, keys, mask, origin = 0, project(0), visible_frames(plan), 0
    video = inputs["noise"](0, 0, 0)[row] if context is None else context[row]
    given = start = video.shape[2]
    labels = [0.0] * given
    for index in range(plan.leading_blocks(given), len(plan.blocks)):
        count = plan.blocks[index]
        end = start + count
        if sum(start >= frame for frame in plan.switches) > prompt:  # the sink uses the new prompt as well
            prompt, origin = prompt + 1, max(0, start - plan.capacity)
            keys, mask, labels = project(prompt), visible_frames(plan, origin, start), [plan.context_noise] * start
        steps = plan.first_steps if start == given else plan.steps
        x = inputs["noise"](start, count, 0)[row]
        for number, (timestep, sigma) in enumerate(steps):
            x, fixed = hold(x, start)
            whole = torch.cat((video, x), dim=2)
            if inputs["y"] is not None:
                whole = torch.cat((whole, inputs["y"][row, :, :end]), dim=1)
            t = torch.tensor([labels + [0.0] * fixed + [timestep] * (count - fixed)])
            seen = end - origin
            flows = [network(whole[:, :, origin:], t[:, origin:], key, range(origin, end),
                             mask_FF=mask[:seen, :seen])[:, :, start - origin:] for key in keys]
            flow = flows[0] if plan.cfg == 1 else flows[1] + plan.cfg * (flows[0] - flows[1])
            x0, _ = hold(x - sigma * flow, start)
            if number + 1 < len(steps):
                later = steps[number + 1].sigma
                x = (1 - later) * x0 + later * inputs["noise"](start, count, number + 1)[row]
        video, labels, start = torch.cat((video, x0), dim=2), labels + [plan.context_noise] * count, end
    return video[:, :, given:]
