"""The ComfyUI extension: node classes in menu order.

Node modules are imported when ComfyUI requests them, so the other modules of this package can be used with torch
alone. If one fails to import, only its own nodes are missing.
"""

import logging
from importlib import import_module
from importlib.util import find_spec

from .common.examples import offer_examples
from .common.inputs import checked

# (module, class), in menu order; the node's id is Stillmotion_<class without "Node" at its end>
NODES = [
    ("dynamicrafter.nodes", "LoadDynamiCrafter"),
    ("dynamicrafter.nodes", "DynamiCrafterImageToVideo"),
    ("dynamicrafter.nodes_quick", "PictureToVideo"),
    ("ddim.nodes", "DDIMSampler"),
    ("ddim.nodes", "DDIMSamplerSelect"),
    ("ddim.nodes", "SamplingReport"),
    ("diagnosis.nodes", "DiagnoseModel"),
    ("causal_wan.nodes_loading", "LoadCausalWan"),
    ("causal_wan.nodes_loading", "CausalWanImageToVideo"),
    ("causal_wan.nodes_loading", "PromptTimelineNode"),
    ("causal_wan.nodes_sampling", "BlockAutoregressiveSampler"),
    ("causal_wan.nodes_sampling", "BlockAutoregressiveToFile"),
    ("video_unet.nodes", "LoadVideoUNet"),
    ("video_unet.nodes", "VideoUNetConditions"),
    ("training.nodes", "TrainVideoModel"),
    ("training.self_rollout.nodes", "SelfRollout"),
    ("training.data.nodes", "VideoFolderNode"),
    ("training.data.nodes", "MovingShapesNode"),
    ("training.data.nodes", "LatentShardsNode"),
    ("training.data.nodes", "PromptList"),
    ("training.data.nodes", "DataSetClip"),
    ("evaluation.nodes", "EvaluateVideo"),
    ("common.nodes_folder", "ImagePromptFolder"),
    ("common.nodes", "SaveVideo"),
]


def load_nodes(listed):
    """The node classes of `listed`, a list like NODES; those that fail to load are skipped and logged."""
    loaded, lost = [], {}
    for module, name in listed:
        try:
            node = getattr(import_module(f".{module}", __name__), name)
            node.GET_SCHEMA()  # ComfyUI reads it next, and would drop the whole pack if one schema fails
        except Exception as error:  # whatever the error, the other nodes work without this one
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            lost.setdefault(cause, []).append(f"Stillmotion_{name.removesuffix('Node')}")
        else:
            loaded.append(checked(node))
    for cause, ids in lost.items():
        logging.error("Stillmotion: %s did not load in ComfyUI %s (%s). The other nodes work. Update this pack. If "
                      "that does not help, report this line and use a release of ComfyUI that the README "
                      "lists.", ", ".join(ids), _release(), cause)
    return loaded


def _release():
    if find_spec("comfyui_version") is None:
        return "of an unknown release"
    return import_module("comfyui_version").__version__


async def comfy_entrypoint():
    """Entry point that ComfyUI calls to get the pack's nodes."""
    import folder_paths
    from comfy_api.latest import ComfyExtension

    offer_examples(folder_paths.get_input_directory())

    class Stillmotion(ComfyExtension):
        async def get_node_list(self):
            return load_nodes(NODES)

    return Stillmotion()
