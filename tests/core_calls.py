"""What the tests do as core does it, in the words of every release."""
from comfy import sd
from comfy_api.latest import io
from comfy_api.latest._io import HiddenHolder
from safetensors.torch import load_file


def with_hidden(node, prompt, extra_pnginfo):
    """A node class as ComfyUI executes it, with its hidden inputs."""
    hidden = HiddenHolder.from_dict({io.Hidden.prompt: prompt, io.Hidden.extra_pnginfo: extra_pnginfo})
    return type(node.__name__, (node,), {"hidden": hidden})


def saved_by_core(model, path):
    """The tensors that core's Save Checkpoint writes of a MODEL."""
    sd.save_checkpoint(str(path), model)
    return load_file(path)
