"""Block-Autoregressive Sampler: returns a LATENT, or writes directly to a file for videos that do not fit in memory."""

import os
from contextlib import ExitStack, contextmanager
from pathlib import Path

import comfy.model_management
import folder_paths
import latent_preview
from comfy_api.latest import InputImpl, io, ui

from ..common.memory import memory_advice
from ..common.nodes import output_name, workflow_tags
from ..common.saving import holding, new_file, saving
from ..common.schema import schema
from ..common.values import check_path
from ..common.video import MAX_FPS, check_mp4, frames_uint8, open_mp4
from .live import LiveDecoder
from .nodes_live import live, used_prompts
from .resume import BlockFolder
from .run import UNTIL_STOPPED, BlockSettings, prepare

Timeline = io.Custom("STILLMOTION_PROMPT_TIMELINE")
LESS_MEMORY = "Use a smaller window, size or block, or cfg 1 (half the cache)."
ADVANCED = ["first_steps", "shift", "warp", "independent_first", "short_last_block", "context_noise", "refresh_sink"]


def _inputs():
    return [
        io.Model.Input("model", tooltip="From Load Causal Wan; LoRAs and other model patches can be between."),
        io.Conditioning.Input("positive", tooltip="The prompt, from Causal Wan Image to Video."),
        io.Conditioning.Input("negative", tooltip="What to avoid. Not used at cfg 1."),
        io.Latent.Input("latent", tooltip="From Causal Wan Image to Video, or an empty Wan video latent."),
        io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                     tooltip="Seed of the noise, drawn on the CPU for each latent frame: a longer video begins "
                             "with the frames of a shorter one, on every machine."),
        io.String.Input("steps", default="1000, 750, 500, 250",
                        tooltip="Denoising steps, as trained. Self-Forcing, LongLive: 1000, 750, 500, 250."),
        io.String.Input("first_steps", default="",
                        tooltip="Steps of the first block. Empty: the same. Models with 1 or 2 steps "
                                "(Causal-Forcing++) need 1000, 750, 500, 250 here."),
        io.Float.Input("shift", default=5.0, min=0.01, max=100.0, step=0.01,
                       tooltip="Shift of the noise schedule: 5, CausVid 8."),
        io.Boolean.Input("warp", default=True,
                         tooltip="On: the steps are positions in the shifted schedule (Self-Forcing, LongLive). "
                                 "Off: they are timesteps (CausVid: 1000, 757, 522)."),
        io.Int.Input("block", default=3, min=1, max=64, tooltip="Latent frames per block, as trained: 3 or 1."),
        io.Boolean.Input("independent_first", default=False,
                         tooltip="The first latent frame is a block of its own, for models trained that way. Not "
                                 "used with a prefix frame or a still chunk."),
        io.Boolean.Input("short_last_block", default=False,
                         tooltip="Allow a length that ends inside a block."),
        io.Int.Input("window", default=-1, min=-1, max=100000,
                     tooltip="Latent frames that a block attends to, including sink and itself; memory grows "
                             "with it. -1: the whole video. LongLive: 12."),
        io.Int.Input("sink", default=0, min=0, max=1000,
                     tooltip="First latent frames, which always stay in the window. LongLive: 3."),
        io.Boolean.Input("endless", default=False,
                         tooltip="Keeps the sink's position close to the current block, for videos far longer than "
                                 "the model was trained on."),
        io.Float.Input("context_noise", default=0.0, min=0.0, max=1000.0, step=1.0,
                       tooltip="Timestep at which finished blocks are shown to the model. 0 is as published."),
        io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1,
                       tooltip="Guidance strength. 1 for few-step models; other values need twice the time and "
                                   "cache."),
        io.Boolean.Input("refresh_sink", default=False,
                         tooltip="At a change of prompt, the oldest frames in the window become the sink under the "
                                 "new prompt. Off: the sink stays as it was, as in LongLive."),
    ]


def _clip_input():
    return io.Clip.Input("clip", optional=True,
                         tooltip="The text encoder of the prompts. With it you can change the prompt while the video "
                                 "is made: a panel appears in this node. It stays in memory beside the model.")


def _summary_output():
    return io.String.Output(display_name="summary", tooltip="Frames, blocks, steps and the size of the cache, and the "
                                                            "prompts that were sent while it ran.")


def _timeline_output():
    return Timeline.Output(display_name="timeline",
                           tooltip="The prompts that were really used: those of the timeline and those that were sent "
                                   "while it ran. Give it to a second run to make the same video again.")


def _resume_input():
    return io.String.Input("resume_folder", default="", optional=True,
                           tooltip="A folder in ComfyUI's output folder. Each finished block is stored there, and an "
                                   "interrupted run with the same settings resumes from them. Empty: none.")


class BlockAutoregressiveSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_BlockAutoregressiveSampler",
            display_name="Block-Autoregressive Sampler",
            category="Stillmotion/Causal Wan",
            description="Samples a video block by block, each in a few steps and with a cache of the blocks before it: "
                        "any length in bounded memory, with prompts that can change.",
            search_aliases=["long video", "LongLive", "Self Forcing", "causal sampler", "streaming", "text to video",
                            "t2v", "image to video", "i2v"],
            advanced=ADVANCED,
            inputs=[
                *_inputs(),
                Timeline.Input("timeline", optional=True, tooltip="Prompts that follow one another, from Prompt "
                                                                  "Timeline."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Decodes each finished block and shows it here. Wan 2.1's VAE, its tiny one "
                                     "(lighttaew2_1: far faster) or the demo's."),
                _resume_input(),
                _clip_input(),
                io.Float.Input("fps", default=16.0, min=0.1, max=MAX_FPS, step=0.1, optional=True,
                               tooltip="Frames that the player in this node shows a second. The saved file has its "
                                       "own. Wan 2.1 was trained on 16."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The whole video, for VAE Decode."),
                _summary_output(),
                _timeline_output(),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, timeline=None, vae=None, resume_folder="", clip=None,
                fps=16.0, **widgets):
        run = prepare(model, positive, negative, latent, timeline, seed, _settings(**widgets), vae, clip=clip)
        with (memory_advice(f"with {run.summary}", LESS_MEMORY), _resume_folder(resume_folder, run) as folder,
              live(run, fps, folder) as shown):
            if vae is None:
                callback, show = latent_preview.prepare_callback(model, run.steps), None
            else:
                decoder = LiveDecoder(vae)
                callback, show = shown.preview.on_step, lambda part_CFHW: shown.show(decoder.decode(part_CFHW))
            found = run.sample(callback, folder, show, shown.steering)
        return io.NodeOutput(found, run.summary + used_prompts(shown.steering), shown.steering.timeline(positive))


class BlockAutoregressiveToFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_BlockAutoregressiveToFile",
            display_name="Block-Autoregressive Sampler to File",
            category="Stillmotion/Causal Wan",
            description="For videos longer than memory: like Block-Autoregressive Sampler, but each finished block is "
                        "decoded and written straight to an MP4, so that the video is not kept in memory.",
            search_aliases=["endless video", "long video", "LongLive", "Self Forcing", "streaming", "save mp4"],
            advanced=[*ADVANCED, "crf"],
            inputs=[
                *_inputs(),
                io.Vae.Input("vae", tooltip="Decodes each finished block: Wan 2.1's VAE, its tiny one "
                                            "(lighttaew2_1: far faster, a little softer) or the demo's."),
                io.Int.Input("length", default=0, min=UNTIL_STOPPED, max=10000000,
                             tooltip="Total video frames, including the given ones; with Wan's VAE 1 + 4 n. 0: as long "
                                     "as the latent. For text-to-video models a short latent is enough, which sets "
                                     "size and start. -1: until you press Stop in this node's panel, or cancel the "
                                     "run; the video so far is kept."),
                io.String.Input("filename_prefix", default="video/Stillmotion",
                                tooltip="Folder and name inside ComfyUI's output folder; a number is added. "
                                        "%year%, %month%, %day%, %hour%, %minute%, %second%, %width%, %height% are "
                                        "filled in; in the page also %date:yyyy-MM-dd% and %Node.widget%."),
                io.Float.Input("fps", default=16.0, min=0.1, max=MAX_FPS, step=0.1,
                               tooltip="Frames shown a second. Wan 2.1 was trained on 16."),
                io.Int.Input("crf", default=16, min=1, max=51,
                             tooltip="1 is best, 16 looks lossless, 23 is small, 51 is worst."),
                Timeline.Input("timeline", optional=True, tooltip="Prompts that follow one another, from Prompt "
                                                                  "Timeline."),
                _resume_input(),
                _clip_input(),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The saved file."),
                _summary_output(),
                _timeline_output(),
            ],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, vae, length, filename_prefix, fps, crf, timeline=None,
                resume_folder="", clip=None, **widgets):
        run = prepare(model, positive, negative, latent, timeline, seed, _settings(**widgets), vae, length, clip)
        batch, _, _, height, width = latent["samples"].shape
        if batch > 1:
            raise ValueError(f"The latent is a batch of {batch} videos, but a file holds one. Set batch_size to 1 in "
                             "the node that makes the latent.")
        if length == UNTIL_STOPPED and resume_folder.strip():
            raise ValueError("A video until stopped cannot be resumed: give a length, or leave resume_folder empty.")
        check_mp4(fps, crf)
        scale = vae.spacial_compression_decode()
        name, subfolder = output_name(filename_prefix, width * scale, height * scale, ".mp4")
        decoder = LiveDecoder(vae)
        with (memory_advice(f"with {run.summary}", LESS_MEMORY), _resume_folder(resume_folder, run) as folder,
              live(run, fps, folder) as shown, new_file(name) as content,
              _writing(name.path, content, fps, crf, workflow_tags(cls.hidden)) as add):
            def show(part_CFHW):
                frames_THWC = decoder.decode(part_CFHW)
                shown.show(frames_THWC)
                add(frames_uint8(frames_THWC))

            with _ending(length == UNTIL_STOPPED, shown):
                run.stream(shown.preview.on_step, folder, show, shown.steering)
        saved = [ui.SavedResult(name.path.name, subfolder, io.FolderType.output)]
        return io.NodeOutput(InputImpl.VideoFromFile(str(name.path)), run.summary + used_prompts(shown.steering),
                             shown.steering.timeline(positive), ui={"images": saved, "animated": (True,)})


@contextmanager
def _ending(kept, shown):
    """If `kept`, cancelling the run in the with block ends the block only, once something is there to keep."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        if not kept or not shown.steering.frames:
            raise


@contextmanager
def _writing(path, content, *settings):
    """Yields add(frames), which appends to the MP4 `content`; disk errors are reported for the result `path`."""
    with ExitStack() as stack:
        with saving(path):
            add_frame = stack.enter_context(open_mp4(content, *settings))

        def add(frames):
            with saving(path):
                for frame in frames:
                    add_frame(frame)

        yield add
        with saving(path):
            stack.close()


def _settings(short_last_block, refresh_sink, **widgets):
    return BlockSettings(short_last=short_last_block, global_sink=not refresh_sink, **widgets)


@contextmanager
def _resume_folder(name, run):
    """The resume folder with this name, locked until the run ends; None for an empty name."""
    if not name.strip():
        yield None
        return
    check_path("resume_folder", name)
    output = os.path.abspath(folder_paths.get_output_directory())
    path = os.path.abspath(os.path.join(output, name.strip()))
    if not path.startswith(os.path.join(output, "")):
        raise ValueError(f"resume_folder is {name!r}, which is not in ComfyUI's output folder. Use a name such as "
                         "runs/balloon.")
    with holding(Path(path), "The resume folder"):
        yield BlockFolder(Path(path), run.fingerprint())
