"""Settings of self-rollout. The defaults are Self-Forcing's (arXiv 2506.08009) for Wan 2.1 1.3B with a 14B teacher."""
from __future__ import annotations

from dataclasses import dataclass

from ..setting import setting

# Settings shared with other trainings, whose defaults differ here. 64 videos an update, in all processes together.
DEFAULTS = {"num_frames": 81, "frame_size": "832x480", "validation_clips": 0, "steps": 600, "learning_rate": 2e-6,
            "warmup": 0, "batch_size": 1, "accumulation": 64, "ema_decay": 0.99, "clip_norm": 10.0,
            "gradient_checkpointing": True}


@dataclass(kw_only=True)
class SelfRolloutSettings:
    """What self-rollout adds to the settings of a training. The texts are the command line's help."""

    teacher: str = setting("", "bidirectional many-step model, whose videos the student learns to make")
    fake_score: str = setting("", "what the fake score begins with; empty: the teacher")
    rollout_steps: list[int] = setting(lambda: [1000, 750, 500, 250], "the student's denoising steps")
    rollout_shift: float = setting(5.0, "shift of its schedule towards noise")
    rollout_warp: bool = setting(True, "the steps are positions in the shifted schedule, not timesteps")
    context_noise: float = setting(0.0, "timestep of the pass over a finished block")
    independent_first: bool = setting(False, "the first latent frame is a block of its own")
    first_latent: bool = setting(False, "text-to-video students: image to video with the image as clean "
                                 "first latent, at timestep 0")
    rollout_window: int = setting(-1, "latent frames a block sees, itself and the sink included; -1: all")
    rollout_sink: int = setting(0, "first latent frames that stay in the window")
    rollout_endless: bool = setting(False, "the sink keeps its distance to a moving window")
    gradient_frames: int = setting(21, "last latent frames, that the scores see and the student learns "
                                   "from")
    stream_frames: int = setting(0, "latent frames of a video that goes on over several updates with its "
                                 "caches kept (LongLive: 240); 0: every update begins a new one")
    stream_new: int = setting(18, "new latent frames an update of such a video")
    stream_switch_first: int = setting(21, "such a video changes its prompt where an update begins, at a "
                                       "latent frame drawn from here on")
    stream_switch_last: int = setting(201, "last latent frame drawn for that; 0: the prompt stays")
    score_shift: float = setting(5.0, "shift of the timesteps of both scores")
    score_min: float = setting(20.0, "smallest timestep of the scores")
    score_max: float = setting(980.0, "largest timestep of the scores")
    score_per_block: bool = setting(False, "a timestep a block, not one for the video (LongLive 2.0)")
    teacher_cfg: float = setting(4.0, "guidance of the teacher (4 is Self-Forcing's 3 + 1)")
    negative_prompt: str = setting("", "prompt that the teacher is led away from")
    fake_updates: int = setting(5, "updates of the fake score for each of the student")
    fake_learning_rate: float = setting(4e-7, "of the fake score")
    adam_beta1: float = setting(0.0, "AdamW, both networks")
    adam_beta2: float = setting(0.999, "AdamW, both networks")
    weight_decay: float = setting(0.01, "AdamW, both networks")
    ema_start: int = setting(200, "step at which the moving average begins")
    fake_lora: bool = setting(False, "train a LoRA of lora_rank beside the fake score's weights, not the weights")

    def check_self_rollout(self) -> None:
        """Raise ValueError for an invalid setting; names the setting, its value and what is allowed."""
        for name in ("rollout_shift", "score_shift", "gradient_frames", "stream_new", "teacher_cfg", "fake_updates",
                     "fake_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from 0 to below 1.")
        for name in ("rollout_sink", "stream_frames", "stream_switch_first", "stream_switch_last", "weight_decay",
                     "ema_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more.")
        if not 0 < self.score_min <= self.score_max < 1000:
            raise ValueError(f"score_min is {self.score_min} and score_max {self.score_max}: give timesteps above 0 "
                             "and below 1000, the smaller one first.")
        if self.stream_frames:
            self._check_stream()

    def _check_stream(self) -> None:
        if not self.stream_new < self.gradient_frames <= self.stream_frames:
            raise ValueError(f"stream_new is {self.stream_new}, gradient_frames {self.gradient_frames} and "
                             f"stream_frames {self.stream_frames}: each must be at most the next, and stream_new "
                             "smaller than gradient_frames.")

    def stream_starts(self) -> range:
        """Latent frames at which the updates of a long video begin, all but the first."""
        return range(self.gradient_frames, self.stream_frames - self.stream_new + 1, self.stream_new)

    def switches(self) -> list[int]:
        """Latent frames at which a long video may change its prompt."""
        return [start for start in self.stream_starts() if self.stream_switch_first <= start <= self.stream_switch_last]
