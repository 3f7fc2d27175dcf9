"""The extension: node classes in menu order.

The families' node modules are imported when ComfyUI asks for them, so the engine modules below this
package can be used with torch alone.
"""

from importlib import import_module

# (folder, class in its nodes.py), in menu order
NODES = [
    ("dynamicrafter", "LoadDynamiCrafter"),
    ("dynamicrafter", "DynamiCrafterImageToVideo"),
    ("sampling", "DDIMSampler"),
    ("sampling", "DDIMSamplerSelect"),
    ("sampling", "SamplingReport"),
    ("diagnosis", "DiagnoseModel"),
    ("causal_wan", "LoadCausalWan"),
    ("causal_wan", "CausalWanImageToVideo"),
    ("causal_wan", "PromptTimelineNode"),
    ("causal_wan.sampling", "BlockAutoregressiveSampler"),
    ("causal_wan.sampling", "BlockAutoregressiveToFile"),
    ("video_unet", "LoadVideoUNet"),
    ("video_unet", "VideoUNetConditions"),
    ("training.trainer", "TrainVideoModel"),
    ("training.data_sets", "VideoFolderNode"),
    ("training.data_sets", "MovingShapesNode"),
    ("training.data_sets", "LatentShardsNode"),
    ("training.data_sets", "DataSetClip"),
    ("training.data_sets", "EvaluateVideo"),
    ("common", "SaveVideo"),
]


async def comfy_entrypoint():
    """What ComfyUI calls to get the pack's nodes."""
    from comfy_api.latest import ComfyExtension

    import_module(".common.nodes", __name__).offer_examples()

    class Stillmotion(ComfyExtension):
        async def get_node_list(self):
            return [getattr(import_module(f".{family}.nodes", __name__), name) for family, name in NODES]

    return Stillmotion()
