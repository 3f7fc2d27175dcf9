"""What self-rollout needs: bytes and operations, counted on meta tensors, so nothing is allocated or computed.

The networks, the rollout, its cache and both losses are those of the trainer, run with the shapes of the real models
in bfloat16 (weights that learn count as float32, as the trainer keeps them). Attention counts as a fused kernel: its
inputs and its result are kept, its scores are not. Time is operations at a stated share of an H100's peak.
"""
import math

# student, teacher: width, feed-forward, heads, layers; latent frames, height, width; block
PRESETS = {"1.3b": ((1536, 8960, 12, 30), (5120, 13824, 40, 40), (21, 60, 104), 3),
           "14b": ((5120, 13824, 40, 40), (5120, 13824, 40, 40), (21, 60, 104), 3),
           "demo": ((128, 512, 4, 4), (128, 512, 4, 4), (16, 8, 8), 4)}
PEAK, SHARE = 989e12, 0.4     # bfloat16 on an H100 SXM, and the share of it that large transformers reach in training
CARDS = {"80 GB": 80e9, "141 GB": 141e9}
KEPT_FREE = 0.1               # of a card, for fragmentation and kernels
VIDEOS = 64                   # an update, as published
LEARNING = {"weights": 4, "gradients": 4, "AdamW": 8}  # bytes of a parameter


def measure(options, folder):
    import torch
    with torch.inference_mode(False), torch.enable_grad():
        figures = counted(options.preset)
    print(table(figures))
    return figures


def counted(preset):
    import torch
    from stillmotion.nodes.training.self_rollout.method import SelfRollout
    from stillmotion.nodes.training.self_rollout.settings import DEFAULTS, SelfRolloutSettings
    small, large, (frames, height, width), block = PRESETS[preset]
    settings, count = SelfRolloutSettings(gradient_frames=frames), Count()
    student, teacher, fake = (network(sizes, count) for sizes in (small, large, small))
    method = SelfRollout(student=student, real=teacher, fake=fake, settings=settings, block=block)
    shape = (1, student.params.out_dim, frames, height, width)
    known, draw = conditions(student.params), torch.Generator().manual_seed(0)
    with torch.no_grad():
        first, last = (count.of(lambda: method.roll_out(known, shape, step, draw, learn=False))[0]
                       for step in (0, len(method.steps) - 1))
    saved, piece = kept(lambda: method.roll_out(known, shape, 0, draw, learn=True))
    scores, _ = count.of(lambda: method.student_loss(piece, draw))
    one, _ = count.of(lambda: method.fake_loss(piece._replace(x0_BCFHW=piece.x0_BCFHW.detach()), draw))
    with torch.no_grad():
        rollout = method.begin(known, shape, 0, draw)
        rollout.take(frames)
    layer, _ = kept(lambda: one_layer(student, known, piece.x0_BCFHW))
    nets = {"student": student, "teacher": teacher, "fake": fake}
    parameters = {name: sum(value.numel() for value in net.parameters()) for name, net in nets.items()}
    cache = sum(tensor.nbytes for tensor in rollout.caches[0].tensors())
    tokens = frames * height * width // 4
    borders = student.params.num_layers * tokens * student.params.dim * 2
    resident = {"student": parameters["student"] * (sum(LEARNING.values()) + 4),  # and its moving average
                "fake score": parameters["fake"] * sum(LEARNING.values()), "teacher": parameters["teacher"] * 2}
    passing = {"student's update": cache + borders + layer, "fake score's update": cache + borders + layer}
    # A rollout to the first step is a pass over each block and a clean one; each further step adds a pass.
    a_pass = (last - first) / (len(method.steps) - 1)
    student_flops = (first + last) / 2 + 3 * a_pass + scores    # backward: recomputed once, then twice its operations
    fake_flops = (first + last) / 2 + 4 * one
    step = fake_flops + student_flops / settings.fake_updates
    figures = {
        "preset": preset, "latent": [frames, height, width], "latents_agree": True,
        "parameters": parameters, "resident_bytes": resident, "cache_bytes": cache,
        "activation_bytes": {"checkpointed": borders + layer, "plain": saved}, "transient_bytes": passing,
        "flops": {"student": student_flops, "fake": fake_flops, "step": step},
        "gpus": plan(sum(resident.values()), max(passing.values()), largest_unit(teacher)),
        "hours": {gpus: round(DEFAULTS["steps"] * VIDEOS * step / (gpus * PEAK * SHARE) / 3600, 1) for gpus in (8, 64)}}
    return figures


def network(sizes, count):
    import torch
    from stillmotion.nodes.causal_wan.model import CausalWan, WanParams
    dim, ffn, heads, layers = sizes
    real = dim > 128
    params = WanParams(in_dim=16 if real else 4, out_dim=16 if real else 4, dim=dim, ffn_dim=ffn, num_heads=heads,
                       num_layers=layers, text_dim=4096 if real else 32, freq_dim=256 if real else 64, i2v=False,
                       clip_dim=0)
    with torch.device("meta"):
        return CausalWan(params, torch.nn, count.attention, dtype=torch.bfloat16)


def conditions(params):
    import torch
    from stillmotion.nodes.training.self_rollout.conditions import Conditions
    text = torch.empty(1, 512 if params.text_dim == 4096 else 77, params.text_dim, dtype=torch.bfloat16, device="meta")
    return Conditions(texts=(text,), negative_BND=text, image_BNW=None, y_BYFHW=None, first_BC1HW=None)


class Count:
    """Operations of matrix products, convolutions and attention."""

    def __init__(self):
        self.attended = 0

    def attention(self, q, k, v, heads, **_):
        self.attended += 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
        return fused().apply(q, k, v)

    def of(self, function):
        """(operations, result)"""
        from torch.utils.flop_counter import FlopCounterMode
        self.attended = 0
        with FlopCounterMode(display=False) as counter:
            result = function()
        return counter.get_total_flops() + self.attended, result


def fused():
    """Attention as a fused kernel keeps it for backward."""
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(context, q, k, v):
            out = torch.empty_like(q)
            context.save_for_backward(q, k, v, out)
            return out

        @staticmethod
        def backward(context, grad):
            raise NotImplementedError("the bench counts forward passes")

    return Fused


def kept(function):
    """(bytes that backward would keep, result): every tensor once, without weights."""
    import torch
    held = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not tensor.is_leaf:
            storage = tensor.untyped_storage()
            held[storage._cdata] = (storage, storage.nbytes())  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(size for _, size in held.values()), result


def one_layer(net, known, x0):
    """One layer over the whole video, as gradient checkpointing recomputes it."""
    import torch
    t = torch.zeros(1, x0.shape[2], device="meta")
    keys = net.project_context(known.texts[0], None)[:1]
    layers, net.blocks = net.blocks, net.blocks[:1]
    try:
        return net(x0.to(torch.bfloat16), t, keys, range(x0.shape[2]))
    finally:
        net.blocks = layers


def largest_unit(net):
    """Bytes of one layer in bfloat16, which sharding gathers (and the next one meanwhile)."""
    return 2 * 2 * sum(value.numel() for value in net.blocks[0].parameters())


def plan(resident, transient, unit):
    """Fewest cards of each size, whole copies in each (DistributedDataParallel) or everything sharded (FSDP)."""
    found = {}
    for name, size in CARDS.items():
        room = size * (1 - KEPT_FREE) - transient
        sharded = math.ceil(resident / (room - unit)) if room > unit else None
        found[name] = {"copies": 1 if resident <= room else None, "sharded": sharded}
    return found


def table(figures):
    def gigabytes(number):
        return f"{number / 1e9:8.1f} GB"

    rows = [(f"{name}: weights" + ("" if name == "teacher" else ", gradients, AdamW")
             + (", average" if name == "student" else ""), size) for name, size in figures["resident_bytes"].items()]
    rows += [("held all the time", sum(figures["resident_bytes"].values())),
             ("cache of keys and values", figures["cache_bytes"]),
             ("activations, gradient checkpointing", figures["activation_bytes"]["checkpointed"]),
             ("activations, without", figures["activation_bytes"]["plain"])]
    lines = [f"{name:44}{gigabytes(size)}" for name, size in rows]
    for card, need in figures["gpus"].items():
        alone = "one card holds a whole copy" if need["copies"] else "a whole copy does not fit into one card"
        lines.append(f"cards of {card}: {alone}; sharded (FSDP): {need['sharded']} or more")
    lines += [f"600 steps of {VIDEOS} videos at {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s on {gpus} GPUs: {hours} h"
              for gpus, hours in figures["hours"].items()]
    return "\n".join(lines)
