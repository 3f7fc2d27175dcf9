"""Files and folders that appear whole or not at all.

What is being written lies in a hidden folder of its own beside its place, which the writing process holds locked. The
lock ends with the process, however that ends, so that whoever writes there next knows what a killed one left behind.
"""
import errno
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

log = logging.getLogger(__name__)

MARK = "stillmotion-part"  # at the end of the hidden folders' names
LOCK = ".stillmotion-lock"
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)                      # by another process
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # as on exFAT
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


class NewName:
    """A name in `folder` that nobody has: NAME_00001_EXTENSION, or with the next free number from `number` on."""

    def __init__(self, folder: Path, name: str, number: int, extension: str):
        self.folder, self.name, self.number, self.extension = folder, name, number, extension

    @property
    def path(self) -> Path:
        """The name that is tried, and the one that was taken after `new_file`."""
        return self.folder / f"{self.name}_{self.number:05}_{self.extension}"


@contextmanager
def new_file(name: NewName) -> Iterator[Path]:
    """Yields the path to write a new file or folder at; when the with block ends it gets its name.

    Where another process took that name meanwhile, it gets the next one. After an error nothing is left.
    """
    with saving(name.path):
        work = _Work(name.path)
    with work:
        yield work.content
        with saving(name.path):
            while not _take(work.content, name.path):
                name.number += 1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As `new_file`, for a file that may replace the one at `path`."""
    with saving(path), _Work(path) as content:
        yield content
        os.replace(content, path)


def write_file(path: str | Path, data: bytes) -> None:
    """Write data to path in one step, in place of what may be there; OSError says what to do."""
    with replacing(Path(path)) as content:
        content.write_bytes(data)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Raise an OSError of the with block again, with advice."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"could not save {path}: {error.strerror or error}. Nothing was written. "
                                   "Free space on the disk, or make the folder writable, or choose another "
                                   "one") from error


@contextmanager
def holding(folder: Path, what: str) -> Iterator[None]:
    """Keeps other processes from `folder` (`what` names it in messages) until the with block ends.

    ValueError where another one has it, with its number and computer.
    """
    path = folder / LOCK
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    if file is None:
        raise ValueError(f"{what} {folder} is in use by {_holder(path)}. Wait until that run has ended and queue "
                         "again, or name another folder.")
    try:
        file.truncate(1)
        file.seek(1)  # Windows keeps others from reading the first byte
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if fcntl:
            path.unlink(missing_ok=True)  # before it is unlocked: afterwards it could be another one's
        file.close()


def _holder(path: Path) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)
            return file.read(300).decode(errors="replace") or "another run"
    except OSError:  # it has just ended
        return "another run"


class _Work:
    """A hidden folder beside `path`, locked; `content` in it is to be written. Used as a context manager."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        self.lock = None
        while self.lock is None:
            self.folder = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.{MARK}")
            self.folder.mkdir()
            try:
                self.lock = _open_locked(self.folder / "lock")
            except FileNotFoundError:  # another process took the new folder for a left one
                pass
        self.content = self.folder / "content"

    def __enter__(self) -> Path:
        return self.content

    def __exit__(self, *error) -> None:
        self.lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove from `folder` what killed processes were writing there."""
    for left in folder.glob(f".*.{MARK}"):
        try:
            file = (left / "lock").open("r+b")
        except OSError:  # it is being made, or removed
            continue
        with file:
            ours = _lock(file)
            if ours:
                shutil.rmtree(left, ignore_errors=True)
        if ours:
            shutil.rmtree(left, ignore_errors=True)  # what Windows does not remove while it is open
            log.info("%s, left behind by a run that was killed, is removed.", left)


def _open_locked(path: Path) -> BinaryIO | None:
    """The file `path`, made if need be, locked until it is closed; None where another process has it locked."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        if _lock(file) is False:
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its last holder removed it just now


def _lock(file: BinaryIO) -> bool | None:
    """True: the open file is locked for this process. False: another one has it. None: no locks on this file system."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return False if error.errno in HELD else None
    return True


def _take(content: Path, path: Path) -> bool:
    """Give `content` the name `path` in one step; False where something has it already."""
    try:
        if content.is_dir() or not fcntl:  # on Windows no rename replaces anything, elsewhere one of files does
            os.rename(content, path)
        else:
            _link(content, path)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return False
    return True


def _link(content: Path, path: Path) -> None:
    try:
        os.link(content, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        path.open("xb").close()  # a file system without links: the name is taken first
        os.replace(content, path)
