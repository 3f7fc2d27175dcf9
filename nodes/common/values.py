"""Validates the type and range of values from headers and configurations before anything is built."""
from __future__ import annotations

import json
import re
import unicodedata

WIDEST = 65536   # maximum layer width; the widest published one has 49408 rows
DEEPEST = 256    # maximum number of layers of a kind
LONGEST_NAME = 240  # bytes per path component: file systems allow 255, less room for numbers and extensions
LONGEST_PATH = 1000


def whole(value, name, low=1, high=WIDEST):
    """`value`, if it is a whole number in low..high (not true or false). `name` starts the message."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}. It must be a whole number from {low} to {high}.")
    return value


def wholes(values, name, low=1, high=WIDEST, least=1, most=8):
    """A list of `least` to `most` whole numbers, as a tuple."""
    if not isinstance(values, (list, tuple)) or not least <= len(values) <= most:
        raise ValueError(f"{name} is {shown(values)}. It must be a list of {least} to {most} whole numbers.")
    return tuple(whole(value, f"An entry of {name}", low, high) for value in values)


def number(value, name, low, high):
    """`value`, if it is a number above `low` and up to `high` (not NaN, true or false)."""
    if type(value) not in (int, float) or not low < value <= high:
        raise ValueError(f"{name} is {shown(value)}. It must be a number above {low:g} and up to {high:g}.")
    return value


def flag(value, name):
    if type(value) is not bool:
        raise ValueError(f"{name} is {shown(value)}. It must be true or false.")
    return value


def word(value, name):
    """`value`, if it can be part of a file name: only letters, digits and any of `. _ - +`."""
    if not isinstance(value, str) or not 0 < len(value) <= 100 or not all(c.isalnum() or c in "._-+" for c in value):
        raise ValueError(f"{name} is {shown(value)}. It may only have letters, digits and . _ - +.")
    return value


def check_text(name, text):
    """Raise ValueError for NUL and lone surrogates, which cannot be written to a file."""
    if any(letter == "\0" or unicodedata.category(letter) == "Cs" for letter in text):
        raise ValueError(f"{name} is {shown(text)}, which holds NUL or half a character: type it anew.")


def check_path(name, text):
    """Raise ValueError unless `text`, the value of input `name`, can be a path."""
    check_text(name, text)
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError(f"{name} is {shown(text)}, which holds line ends or control characters: give letters, digits "
                         "and ordinary signs.")
    longest = max(re.split(r"[/\\]", text), key=lambda part: len(part.encode()))
    if len(longest.encode()) > LONGEST_NAME or len(text) > LONGEST_PATH:
        raise ValueError(f"{name} is {shown(text)}, too long for a file system. Give at most {LONGEST_NAME} bytes "
                         f"for each name, and {LONGEST_PATH} in all.")


def parse_json(text, source):
    """The JSON object in `text`; `source` names its origin in messages."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{source} is not JSON ({why}). The file is damaged or was edited by hand. Get it "
                         "again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} is not a JSON object but {shown(found)}. The file is damaged or of another kind.")
    return found


def shown(value):
    """A value formatted for a message, truncated to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
