"""One training setting: a dataclass field with its default, help text and choices."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field


def setting(default, text: str, choices: Sequence[str] = ()):
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return field(**factory, metadata={"help": text, "choices": tuple(choices)})
