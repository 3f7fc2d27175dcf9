"""Evaluate Video."""
from comfy_api.latest import io

from ..common.drawing import as_images
from ..common.schema import schema
from .metrics import compare
from .plot import draw_scores


class EvaluateVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_EvaluateVideo",
            display_name="Evaluate Video",
            category="Stillmotion/training",
            description="Measures a video against the true one, per frame and in the mean: PSNR, SSIM and motion "
                        "error. Needs the package scikit-image.",
            search_aliases=["psnr", "ssim", "metrics", "compare videos", "video quality"],
            inputs=[
                io.Image.Input("result", tooltip="The frames to judge."),
                io.Image.Input("truth", tooltip="The true frames: as many and as large."),
                io.Int.Input("clip_frames", default=0, min=0, max=10 ** 5,
                             tooltip="0: all frames are one clip. Otherwise several clips of this length lie one "
                                     "behind the other, as decoding a batch gives them."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The means and the values of every frame."),
                io.Image.Output(display_name="plot", tooltip="The same, drawn over the frames."),
                io.Float.Output(display_name="psnr", tooltip="Mean PSNR in dB: more is closer, 100 is equal."),
                io.Float.Output(display_name="ssim", tooltip="Mean SSIM: 1 is equal."),
                io.Float.Output(display_name="motion_error",
                                tooltip="Mean distance between the movements in both videos, in pixels a frame; 0 for "
                                        "clips of one frame."),
            ],
        )

    @classmethod
    def execute(cls, result, truth, clip_frames) -> io.NodeOutput:
        scores = compare(result, truth, clip_frames)
        psnr, ssim, motion = scores.mean()
        return io.NodeOutput(scores.table(), as_images(draw_scores(scores)), psnr, ssim, motion or 0.0)
