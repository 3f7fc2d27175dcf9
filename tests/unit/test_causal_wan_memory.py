"""Memory of the block-autoregressive sampler over a long video, measured during the run."""

import gc
from itertools import pairwise

import pytest
import torch
from causal_wan_stub import load, tensors
from stillmotion.nodes.causal_wan.run import BlockSettings, prepare
from stillmotion.nodes.causal_wan.timeline import PromptTimeline

BLOCK, BLOCKS, SIDE, CHANNELS = 1, 200, 8, 16
BLOCK_BYTES = BLOCK * CHANNELS * SIDE * SIDE * 4


def in_use():
    """(bytes of all live tensors, number of Python objects)"""
    gc.collect()
    found = gc.get_objects()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found
                if issubclass(type(tensor), torch.Tensor) and tensor.device.type == "cpu"
                and tensor.layout == torch.strided}
    return sum(storages.values()), len(found)


@pytest.mark.parametrize("streamed, switches", [(True, False), (True, True), (False, False)])
def test_memory_stays_the_same_over_200_blocks(streamed, switches):
    """Streamed: not a byte more at the end than shortly after the window is full. Otherwise only the video is added."""
    settings = BlockSettings(steps="1000", first_steps="", shift=5.0, warp=True, block=BLOCK, independent_first=False,
                             short_last=False, window=4, sink=1, endless=True, context_noise=0.0,
                             cfg=1.0, global_sink=True)
    text = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    timeline = PromptTimeline((0, 20, 150), tuple([[text * size, {}]] for size in (1, 2, 3))) if switches else None
    samples = torch.zeros(1, CHANNELS, BLOCK * BLOCKS, SIDE, SIDE)
    run = prepare(load(tensors(), weight_dtype="fp32"), [[text, {}]], [], {"samples": samples}, timeline, 0,
                  settings)
    measured, shown = {}, []

    def callback(step, *_):
        if step in (40, 120, 199):
            measured[step] = in_use()

    with torch.inference_mode():
        if streamed:
            run.stream(callback, None, lambda latent: shown.append(latent.isfinite().all().item()))
            assert shown == [True] * BLOCKS
        else:
            assert run.sample(callback)["samples"].shape == samples.shape
    (early, *_), (late, *_) = measured[40], measured[199]
    kept = 0 if streamed else 159 * BLOCK_BYTES
    assert late - early <= kept
    objects = [count for _, count in measured.values()]
    # five per block; unrelated one-time allocations in this process show up in only one half
    assert min(after - before for before, after in pairwise(objects)) < 400
