"""Picture to Video (one node): the graph of the template 'Animate a picture' as one node."""
import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..common.demo import DYNAMICRAFTER_DEMOS
from ..common.schema import schema

FPS = 8.0
# everything that the model itself decides, and the official settings for the rest
SAMPLING = {"steps": 0, "cfg": -1.0, "eta": 1.0, "spacing": "auto", "guidance_rescale": -1.0, "denoise": 1.0,
            "image_cfg": 0.0, "clip_x0": "off", "clip_value": 3.0, "recompute_eps": False, "start_step": 0,
            "end_step": 1000, "tables": "fixed"}
SIZE = {"mode": "animate", "width": 0, "height": 0, "frames": 16, "fs": 0, "batch_size": 1}


class PictureToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_PictureToVideo",
            display_name="Picture to Video (one node)",
            category="Stillmotion/DynamiCrafter",
            description="A picture and a prompt in, a video out: loading, conditioning, sampling and decoding in one "
                        "node, with the model's own size and settings.",
            search_aliases=["image to video", "i2v", "img2vid", "animate", "quick video", "all in one"],
            inputs=[
                io.Image.Input("image", tooltip="The first frame. Scaled and cropped to the model's size."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What happens in the video."),
                io.Combo.Input("checkpoint",
                               options=[*DYNAMICRAFTER_DEMOS, *folder_paths.get_filename_list("checkpoints")],
                               tooltip="A DynamiCrafter file in models/checkpoints. The demos are small models that "
                                       "come with this pack: they know drawn pictures only."),
                io.Int.Input("seed", default=123, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="Seed of the noise: another seed, another video."),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip=f"{SIZE['frames']} frames at {FPS:g} a second, for Save "
                                                              "Video."),
                io.Image.Output(display_name="frames", tooltip="The same as images."),
            ],
            enable_expand=True,
        )

    @classmethod
    def execute(cls, image, prompt, checkpoint, seed) -> io.NodeOutput:
        """Expands into the nodes of the template, so that ComfyUI keeps the loaded model from run to run."""
        graph = GraphBuilder()
        parts = graph.node("Stillmotion_LoadDynamiCrafter", checkpoint=checkpoint, variant="auto", weight_dtype="auto",
                           yaml="")
        model, clip, clip_vision, vae = (parts.out(i) for i in range(4))
        texts = [graph.node("CLIPTextEncode", clip=clip, text=text).out(0) for text in (prompt, "")]
        start = graph.node("Stillmotion_DynamiCrafterImageToVideo", positive=texts[0], negative=texts[1],
                           clip_vision=clip_vision, vae=vae, image=image, **SIZE)
        latent = graph.node("Stillmotion_DDIMSampler", model=model, positive=start.out(0), negative=start.out(1),
                            latent=start.out(2), seed=seed, **SAMPLING)
        frames = graph.node("VAEDecode", samples=latent.out(0), vae=vae)
        video = graph.node("CreateVideo", images=frames.out(0), fps=FPS)
        return io.NodeOutput(video.out(0), frames.out(0), expand=graph.finalize())
