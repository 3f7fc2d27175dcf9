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
            description="Compares a video with the true one, per frame and on average: PSNR, SSIM and motion error. "
                        "Needs the package scikit-image.",
            search_aliases=["psnr", "ssim", "metrics", "compare videos", "video quality"],
            inputs=[
                io.Image.Input("result", tooltip="The frames to evaluate."),
                io.Image.Input("truth", tooltip="The true frames: same number and size."),
                io.Int.Input("clip_frames", default=0, min=0, max=10 ** 5,
                             tooltip="0: all frames are one clip. Otherwise there are several clips of this length in "
                                     "a row, as from decoding a batch."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The means and the values of each frame."),
                io.Image.Output(display_name="plot", tooltip="The same, drawn over the frames."),
                io.Float.Output(display_name="psnr", tooltip="Mean PSNR in dB: higher is closer, 100 is equal."),
                io.Float.Output(display_name="ssim", tooltip="Mean SSIM: 1 is equal."),
                io.Float.Output(display_name="motion_error",
                                tooltip="Mean difference of the motion in both videos, in pixels per frame; 0 for "
                                        "clips of one frame."),
            ],
        )

    @classmethod
    def execute(cls, result, truth, clip_frames) -> io.NodeOutput:
        scores = compare(result, truth, clip_frames)
        psnr, ssim, motion = scores.mean()
        return io.NodeOutput(scores.table(), as_images(draw_scores(scores)), psnr, ssim, motion or 0.0)
