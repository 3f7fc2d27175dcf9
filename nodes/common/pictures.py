"""Reads pictures and folders of pictures, clips and prompts, for both nodes and commands.

Imports nothing from the pack, so that a command can load this file alone.
"""
import re
import struct
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
NO_DATA = ("thumbs.db", "desktop.ini")  # created by Windows; macOS and Linux metadata files begin with a dot
PROMPTS = ("prompts.txt", "test_prompts.txt")  # prompts of all pictures; the official code's folders have the second
LONGEST_PROMPT, LONGEST_PROMPTS = 100_000, 10_000_000  # bytes
LEAST_SIDE = 8  # pixels
LEVELS_16 = ("I;16", "I;16L", "I;16B", "I;16N")
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel
COMMON = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF")
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # in other formats, further pictures are pages or other sizes of the first
UNTIMED = 0.1  # seconds per animation frame if the file does not specify a duration
SHOWN = 20  # names in a summary


class LeftOut(NamedTuple):
    """A skipped file and the reason."""
    name: str
    reason: str


def list_folder(folder: str | Path) -> tuple[list[Path], list[LeftOut]]:
    """(files and folders sorted by name, other entries). Raises OSError for a folder that cannot be read.

    Hidden files, such as macOS's ._NAME next to each NAME, are ignored.
    """
    found, left_out = [], []
    for path in sorted(Path(folder).iterdir(), key=lambda path: normal(path.name)):
        if path.name.startswith(".") or path.name.lower() in NO_DATA:
            continue
        if path.is_file() or path.is_dir():
            found.append(path)
        else:  # reading a pipe or a device would block forever
            reason = "a link to nothing" if path.is_symlink() and not path.exists() else "no file, no folder"
            left_out.append(LeftOut(path.name, reason))
    return found, left_out


def normal(name: str) -> str:
    """The name in normalised Unicode: macOS stores an accent as a separate character, other systems do not."""
    return unicodedata.normalize("NFC", name)


def in_order(path: Path) -> tuple:
    """Sort key for natural order: cat2 comes before cat10."""
    name = normal(path.name)
    parts = re.split(r"(\d+)", name)  # text and digits in turn
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], name


def picture_prompts(folder: str | Path, fits: str = "") -> tuple[list[tuple[Path, str]], list[LeftOut]]:
    """([(picture, prompt)] in natural order, skipped files).

    A picture's prompt is in the text file of the same name beside it, or else in prompts.txt: one line for all
    pictures, or one line a picture in their order. fits: only pictures whose name, with or without its suffix, fits
    this pattern (cat*). Raises OSError for a folder that cannot be read, ValueError for a prompts.txt that does not
    fit the pictures.
    """
    paths, left_out = list_folder(folder)
    texts, pictures, found = {}, [], []
    for path in sorted(paths, key=in_order):
        if path.is_dir():
            left_out.append(LeftOut(path.name, "a folder"))
        elif path.suffix.lower() == ".txt":
            texts.setdefault(normal(path.stem), path)
        elif path.suffix.lower() in PICTURES:
            pictures.append(path)
        else:
            left_out.append(LeftOut(path.name, f"no picture ({', '.join(PICTURES)}) and no .txt"))
    names = {normal(path.stem) for path in pictures}
    shared = next((path for stem, path in texts.items() if path.name.lower() in PROMPTS and stem not in names), None)
    lines = _lines(shared, len(pictures)) if shared else [None] * len(pictures)
    for path, line in zip(pictures, lines):
        text = texts.get(normal(path.stem))
        try:
            if text is None and line is None:
                raise ValueError(f"there is no {path.stem}.txt beside it")
            if not fits or any(fnmatchcase(normal(name).lower(), normal(fits).lower())
                               for name in (path.name, path.stem)):
                found.append((path, read_prompt(text) if text else line))
        except ValueError as error:
            left_out.append(LeftOut(path.name, str(error)))
    left_out += [LeftOut(path.name, "there is no picture of this name") for name, path in texts.items()
                 if name not in names and path != shared]
    return found, left_out


def _lines(path: Path, pictures: int) -> list[str]:
    """The lines of a prompts.txt, one for each picture."""
    lines = [line.strip() for line in read_prompt(path, LONGEST_PROMPTS).splitlines()]
    if len(lines) not in (1, pictures):
        raise ValueError(f"{path.name} has {len(lines)} lines for {pictures} pictures. Write one line for all "
                         "pictures, or one line for each, in the order of their names.")
    return lines * pictures if len(lines) == 1 else lines


def read_prompt(path: Path, longest: int = LONGEST_PROMPT) -> str:
    """Text of a file in UTF-8 or (with a byte order mark) UTF-16; Windows writes both. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            data = file.read(longest + 1)
        if len(data) > longest:
            raise ValueError(f"{path.name} has more than {longest} bytes, too long for a prompt")
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
    return text.replace("\0", "").strip()


def summary(left_out: list[LeftOut]) -> str:
    """Number of skipped files, then the first few with the reason, one per line; empty if there are none."""
    if not left_out:
        return ""
    lines = [f"{len(left_out)} left out:", *(f"- {name}: {reason}" for name, reason in left_out[:SHOWN])]
    if len(left_out) > SHOWN:
        lines.append(f"- and {len(left_out) - SHOWN} more")
    return "\n".join(lines)


def open_picture(path: str | Path) -> Image.Image:
    """A picture as upright 8-bit RGB; of an animation, the first frame. ValueError says what is unreadable and why."""
    with _reading(path), Image.open(path) as picture:
        return _rgb(picture)


def open_animation(path: str | Path) -> Iterator[tuple[float, Image.Image]]:
    """(seconds since the first frame, picture as in `open_picture`) for each frame. Raises ValueError likewise."""
    with _reading(path), Image.open(path) as picture:
        time = 0.0
        for number in range(getattr(picture, "n_frames", 1) if picture.format in ANIMATED else 1):
            picture.seek(number)
            yield time, _rgb(picture)  # read first: some formats only know the duration after that
            time += picture.info.get("duration", 0) / 1000 or UNTIMED


def _rgb(picture: Image.Image) -> Image.Image:
    grey = picture.mode in LEVELS_16 or (picture.mode == "I" and picture.format == "PNG")  # 16-bit mode of older Pillow
    if not grey and picture.mode not in PLAIN:
        raise ValueError(f"has pixels of the kind {picture.mode}. Save it in RGB or grey, 8 or 16 bits a channel")
    if min(picture.size) < LEAST_SIDE:
        raise ValueError(f"is {picture.width}x{picture.height} pixels; each side needs {LEAST_SIDE} or more")
    picture = ImageOps.exif_transpose(picture)
    if grey:
        picture = Image.fromarray(((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Convert the exceptions of unreadable pictures into a ValueError with a clear message."""
    path = Path(path)
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(f"{path.name} is no picture that can be read here. Allowed: {', '.join(PICTURES)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path.name} is too large ({error}). Save a smaller copy") from error
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from error
    except (OSError, SyntaxError, EOFError, struct.error, LookupError, TypeError, OverflowError,
            MemoryError) as error:  # a damaged file can raise any of these
        raise ValueError(f"{path.name} is damaged or cannot be read ({error})") from error


def open_start(path: str | Path) -> Image.Image:
    """A start picture, read as by `open_picture`. Raises ValueError also for 16-bit greyscale: scanners and microscopes
    use only part of the range, and only the user knows which."""
    found = open_picture(path)
    with Image.open(path) as picture:
        if picture.mode not in PLAIN:
            raise ValueError(f"{Path(path).name} is grey with 16 bits. Save a copy with 8 bits a channel that shows "
                             "what the video shall begin with.")
    return found


def is_plain(path: str | Path) -> bool:
    """Whether any Load Image node reads the file as `open_picture` does: a single 8-bit picture in a common format."""
    with Image.open(path) as picture:
        single = picture.format == "MPO" or getattr(picture, "n_frames", 1) == 1  # a phone's JPEG with a second image
        return single and picture.mode in PLAIN and picture.format in COMMON
