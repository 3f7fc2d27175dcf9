"""torch.compile: no breaks in the graphs, few graphs, the same numbers, through core's TorchCompileModel."""

import shutil

import causal_wan_stub as wan
import dynamicrafter_stub as crafter
import pytest
import torch
import video_unet_stub as unet
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel
from stillmotion.nodes.causal_wan.cache import KVCache
from stillmotion.nodes.causal_wan.model import CausalWan, WanParams
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.ddim.sampler import DDIMSettings, sample_latent
from stillmotion.nodes.ddim.step import Clip
from stillmotion.nodes.video_unet.conditioning import clip_conditions
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        yield
    torch._dynamo.reset()


def compiled(model, **options):
    """A MODEL as core's TorchCompileModel makes it, but with a backend that compiles nothing, to count its graphs, and
    with core's attention for GPUs: the one for CPUs asks for the free memory, which breaks a graph."""
    model = model.clone()
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "attention"):
            module.attention = attention_pytorch
    set_torch_compile_wrapper(model, **{"backend": "eager", "keys": ["diffusion_model"]} | options)
    return model


def unet_latent(model):
    values = clip_conditions(model.model.video_unet, None, None, "none", 64, 64, 4, 1)[0]
    conds = [[[crafter.draw(1, 77, 32, seed=seed), values]] for seed in (1, 2)]
    settings = DDIMSettings(3, 3.0, 0.0, "auto", 0.0, 1.0, 0.0, Clip("off", 3.0, False), 0, 1000, "fixed")
    return sample_latent(model, *conds, {"samples": torch.zeros(1, 4, 4, 8, 8)}, 3, settings)[0]["samples"]


RUNS = {
    "causal_wan": (lambda: wan.load(wan.strong_tensors(), weight_dtype="fp32"),
                   lambda model: wan.sample(frames=24, model=model, window=6, sink=2), 3),
    "dynamicrafter": (crafter.make, lambda model: crafter.sample(model, crafter.conditioning(), steps=3), 1),
    "video_unet": (unet.make_model, unet_latent, 1),
}


@pytest.mark.parametrize("make, run, most", RUNS.values(), ids=RUNS)
def test_a_run_has_few_graphs_without_breaks(make, run, most):
    """Causal Wan: 12 blocks, of which the window is full from the third on."""
    model = make()
    expected = run(model)
    found = run(compiled(model))
    assert crafter.difference(found, expected) < 1e-5
    assert dict(counters["graph_break"]) == {}
    assert 1 <= counters["stats"]["unique_graphs"] <= most


def test_all_layers_are_one_graph():
    model = wan.load(wan.strong_tensors(), weight_dtype="fp32")
    keys = [f"diffusion_model.blocks.{index}" for index in range(2)]
    first = compiled(model, keys=keys)
    wan.sample(frames=2, model=first)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_full_window_is_explained_without_breaks():
    params = WanParams(**wan.NETWORK | {"num_layers": 12})
    torch.manual_seed(0)
    network = CausalWan(params, torch.nn, torch_attention)
    cache = KVCache(params.cache_layout(capacity=6, sink=2, height=4, width=6, relative_sink=False), 1, torch.float32,
                    "cpu")
    x, t = torch.randn(1, 16, 2, 4, 6), torch.full((1, 2), 500.0)
    keys = network.project_context(torch.randn(1, 7, 24))
    window = network.open(x, range(20, 22), cache, "write")
    told = torch._dynamo.explain(network.evaluate)(x, t, keys, window, {})
    assert told.graph_count == 1 and told.graph_break_count == 0, told.break_reasons


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("make, run, _", RUNS.values(), ids=RUNS)
def test_cores_node_with_its_own_compiler(make, run, _):
    model = make()
    found = run(TorchCompileModel.execute(model, "inductor").result[0])
    assert crafter.difference(found, run(model)) < 1e-4
