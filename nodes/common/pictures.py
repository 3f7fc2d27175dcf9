"""Reads pictures and folders of pictures, clips and prompts, for both nodes and commands.

Imports nothing from the pack, so that a command can load this file alone.
"""
import struct
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
NO_DATA = ("thumbs.db", "desktop.ini")  # created by Windows; macOS and Linux metadata files begin with a dot
LONGEST_PROMPT = 100_000  # bytes
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


def picture_prompts(folder: str | Path) -> tuple[list[tuple[Path, str]], list[LeftOut]]:
    """([(picture, prompt)] of the pictures with a text file of the same name next to them, skipped files)."""
    paths, left_out = list_folder(folder)
    texts, pictures, found = {}, [], []
    for path in paths:
        if path.is_dir():
            left_out.append(LeftOut(path.name, "a folder"))
        elif path.suffix.lower() == ".txt":
            texts.setdefault(normal(path.stem), path)
        elif path.suffix.lower() in PICTURES:
            pictures.append(path)
        else:
            left_out.append(LeftOut(path.name, f"no picture ({', '.join(PICTURES)}) and no .txt"))
    for path in pictures:
        text = texts.get(normal(path.stem))
        try:
            if text is None:
                raise ValueError(f"there is no {path.stem}.txt beside it")
            found.append((path, read_prompt(text)))
        except ValueError as error:
            left_out.append(LeftOut(path.name, str(error)))
    used = {normal(path.stem) for path in pictures}
    left_out += [LeftOut(path.name, "there is no picture of this name") for name, path in texts.items()
                 if name not in used]
    return found, left_out


def read_prompt(path: Path) -> str:
    """Text of a file in UTF-8 or (with a byte order mark) UTF-16; Windows writes both. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST_PROMPT + 1)
        if len(data) > LONGEST_PROMPT:
            raise ValueError(f"{path.name} has more than {LONGEST_PROMPT} bytes, too long for a prompt")
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


def has_16_bits(path: str | Path) -> bool:
    """Whether a picture that `open_picture` reads is 16-bit greyscale."""
    with Image.open(path) as picture:
        return picture.mode not in PLAIN


def is_plain(path: str | Path) -> bool:
    """Whether any Load Image node reads the file as `open_picture` does: a single 8-bit picture in a common format."""
    with Image.open(path) as picture:
        single = picture.format == "MPO" or getattr(picture, "n_frames", 1) == 1  # a phone's JPEG with a second image
        return single and picture.mode in PLAIN and picture.format in COMMON
