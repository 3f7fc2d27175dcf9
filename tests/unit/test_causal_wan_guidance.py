"""Core's nodes on a causal Wan MODEL: guidance nodes act on each block, unsupported ones are rejected."""

from inspect import signature

import pytest
import torch
from causal_wan_stub import conditioning, distance, latent, load, sample, settings, strong_tensors
from comfy_extras import nodes_cfg, nodes_context_windows, nodes_easycache, nodes_model_advanced, nodes_rope
from stillmotion.nodes.causal_wan.run import prepare


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def call(node, **values):
    """Call a core node with those of the values that this release accepts."""
    return node(**{name: value for name, value in values.items() if name in signature(node).parameters})


def make_model():
    return load(strong_tensors(), weight_dtype="fp32")


def test_a_function_that_does_what_core_does_changes_nothing():
    model = make_model()
    told = []

    def plain(given):
        told.append((given["sigma"].tolist(), given["cond_scale"], given["input"].shape))
        return given["uncond"] + given["cond_scale"] * (given["cond"] - given["uncond"])

    model.set_model_sampler_cfg_function(plain)
    changes = dict(frames=4, batch=2, cfg=2.0, shift=8.0, warp=False, steps="1000, 757")
    assert distance(sample(model=model, **changes), sample(**changes)) < 1e-5
    assert len(told) == 4 and told[0] == ([1.0, 1.0], 2.0, (2, 16, 2, 4, 6))


def test_functions_come_in_cores_order():
    model, calls = make_model(), []
    model.set_model_sampler_pre_cfg_function(lambda given: calls.append("before") or given["conds_out"])
    model.set_model_sampler_post_cfg_function(lambda given: calls.append("after") or 0 * given["denoised"])
    found = sample(frames=4, model=model, steps="1000")
    assert calls == ["before", "after"] * 2 and found.shape[2] == 4
    expected = model.model.process_latent_out(torch.zeros_like(found))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("patch", [
    lambda model: nodes_model_advanced.RescaleCFG().patch(model, 0.7)[0],
    lambda model: nodes_cfg.CFGZeroStar.execute(model).result[0]], ids=["RescaleCFG", "CFGZeroStar"])
def test_cores_guidance_nodes_act(patch):
    plain = sample(frames=4, cfg=2.0)
    found = sample(frames=4, cfg=2.0, model=patch(make_model()))
    assert found.isfinite().all() and distance(found, plain) > 1e-3


@pytest.mark.parametrize("patch, words", [
    (lambda model: nodes_easycache.EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False), "EasyCache"),
    (lambda model: nodes_easycache.LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False), "LazyCache"),
    (lambda model: nodes_rope.ScaleROPE.execute(model, 2.0, 0.0, 2.0, 0.0, 2.0, 0.0), "RoPE"),
    (lambda model: call(nodes_context_windows.WanContextWindowsManualNode.execute, model=model, context_length=5,
                        context_overlap=2, context_schedule="standard_static", context_stride=1, closed_loop=False,
                        fuse_method="pyramid", freenoise=False), "context windows")], ids=str)
def test_nodes_for_whole_videos_are_refused(patch, words):
    model = patch(make_model()).result[0]
    with pytest.raises(ValueError, match=f"The model carries .*{words}.* Take that node off"):
        prepare(model, conditioning("t2v", 4, 1), conditioning("t2v", 4, 2), latent("t2v", 4), None, 0, settings())


def test_a_block_that_outgrows_its_type_ends_the_run():
    model = make_model()
    model.set_model_sampler_post_cfg_function(lambda given: given["denoised"] / 0)
    with pytest.raises(ValueError, match="Block 0 has NaN or infinite values: numbers outgrew torch.float32"):
        sample(frames=4, model=model)
