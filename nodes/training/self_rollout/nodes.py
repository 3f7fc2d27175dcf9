"""Self-Rollout: the settings of a training on its own videos, for Train Video Model."""
from dataclasses import Field, dataclass, fields
from typing import Any

from comfy_api.latest import io

from ...common.schema import schema
from ...common.values import shown
from .settings import SelfRolloutSettings

Objective = io.Custom("STILLMOTION_OBJECTIVE")
NUMBERS = [each for each in fields(SelfRolloutSettings) if each.name not in ("teacher", "fake_score")]
SHOWN = ("rollout_steps", "gradient_frames", "teacher_cfg", "negative_prompt", "fake_updates", "fake_learning_rate",
         "first_latent")  # the others are folded away


@dataclass
class SelfRolloutObjective:
    """What the node hands over: its settings and the two MODELs."""

    settings: dict[str, Any]
    teacher: Any
    fake_score: Any


def _input(each: Field):
    """The widget of a setting."""
    about = {"tooltip": f"{each.metadata['help'][0].upper()}{each.metadata['help'][1:]}."}
    if each.type == "bool":
        return io.Boolean.Input(each.name, default=each.default, **about)
    if each.type == "int":
        return io.Int.Input(each.name, default=each.default, min=-1, max=100_000, **about)
    if each.type == "float":
        return io.Float.Input(each.name, default=each.default, min=0.0, max=1000.0, step=1e-7, round=False, **about)
    if each.type == "str":
        return io.String.Input(each.name, default=each.default, multiline=True, **about)
    return io.String.Input(each.name, default=", ".join(map(str, each.default_factory())), **about)


def _whole_numbers(text: str, name: str) -> list[int]:
    """[1000, 750] from "1000, 750"."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"{name} is {shown(text)}: give whole numbers, as 1000, 750, 500, 250.") from error


class SelfRollout(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Stillmotion_SelfRollout",
            display_name="Self-Rollout",
            category="Stillmotion/training",
            description="Trains causal Wan on videos that it makes itself, by distribution matching with a teacher "
                        "(Self-Forcing): few steps without guidance, and no drift. For Train Video Model.",
            search_aliases=["self forcing", "self-forcing", "dmd", "distillation", "longlive", "few steps"],
            advanced=[each.name for each in NUMBERS if each.name not in SHOWN],
            inputs=[
                io.Model.Input("teacher", tooltip="A bidirectional Wan that makes good videos in many steps, for the "
                                                  "latents and text encoder of the student: Wan 2.1 14B for 1.3B."),
                *map(_input, NUMBERS),
                io.Model.Input("fake_score", optional=True, tooltip="What the second score begins with, such as Wan "
                                                                    "2.1 1.3B. Not connected: the teacher."),
            ],
            outputs=[Objective.Output(display_name="objective", tooltip="For Train Video Model.")],
        )

    @classmethod
    def execute(cls, teacher, fake_score=None, **values) -> io.NodeOutput:
        for each in NUMBERS:
            if each.type.startswith("list"):
                values[each.name] = _whole_numbers(values[each.name], each.name)
        SelfRolloutSettings(**values).check_self_rollout()
        return io.NodeOutput(SelfRolloutObjective(values, teacher, fake_score))
