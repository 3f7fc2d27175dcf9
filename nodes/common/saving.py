"""Atomic creation of files and folders.

Output is written to a hidden temporary folder next to its destination, which the writing process keeps locked. The
lock is released when the process ends, however it ends, so the next writer can tell what a killed process left behind.
"""
import errno
import logging
import os
import re
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

MARK = "stillmotion-part"  # suffix of the hidden folders
LOCK = ".stillmotion-lock"
LONGEST_NAME = 60  # characters of a short name; file systems allow 255 bytes
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)                      # locked by another process
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # as on exFAT
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


def short_name(text: str) -> str:
    """`text` as part of a file's name: shortened, "_" for characters that some system does not allow."""
    return re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", text[:LONGEST_NAME])


class NewName:
    """An unused name in `folder`: NAME_00001_EXTENSION, or the next free number, starting at `number`."""

    def __init__(self, folder: Path, name: str, number: int, extension: str):
        self.folder, self.name, self.number, self.extension = folder, name, number, extension

    @property
    def path(self) -> Path:
        """The candidate path; after `new_file`, the path actually used."""
        return self.folder / f"{self.name}_{self.number:05}_{self.extension}"


@contextmanager
def new_file(name: NewName) -> Iterator[Path]:
    """Yields a temporary path for a new file or folder, which is renamed when the with block ends.

    If another process has taken the name meanwhile, the next one is used. After an error nothing is left behind.
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
    """Like `new_file`, for a file that may overwrite the one at `path`."""
    with saving(path), _Work(path) as content:
        yield content
        os.replace(content, path)


def write_file(path: str | Path, data: bytes) -> None:
    """Write data to path atomically, overwriting any existing file; OSError says what to do."""
    with replacing(Path(path)) as content:
        content.write_bytes(data)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Re-raise an OSError of the with block with advice in its message."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"could not save {path}: {error.strerror or error}. Nothing was written. "
                                   "Free space on the disk, or make the folder writable, or choose another "
                                   "one") from error


@contextmanager
def holding(folder: Path, what: str) -> Iterator[None]:
    """Locks `folder` against other processes until the with block ends; `what` names it in messages.

    Raises ValueError if another process holds the lock, with its process ID and computer.
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
        file.seek(1)  # Windows blocks others from reading the locked first byte
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if fcntl:
            path.unlink(missing_ok=True)  # before unlocking: afterwards it could belong to another process
        file.close()


def _holder(path: Path) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)
            return file.read(300).decode(errors="replace") or "another run"
    except OSError:  # that run has just ended
        return "another run"


class _Work:
    """A locked hidden folder next to `path`; the caller writes `content` in it. Used as a context manager."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        self.lock = None
        while self.lock is None:
            self.folder = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.{MARK}")
            self.folder.mkdir()
            try:
                self.lock = _open_locked(self.folder / "lock")
            except FileNotFoundError:  # another process mistook the new folder for a leftover
                pass
        self.content = self.folder / "content"

    def __enter__(self) -> Path:
        return self.content

    def __exit__(self, *error) -> None:
        self.lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished output of killed processes from `folder`."""
    for left in folder.glob(f".*.{MARK}"):
        try:
            file = (left / "lock").open("r+b")
        except OSError:  # it is being created or removed
            continue
        with file:
            ours = _lock(file)
            if ours:
                shutil.rmtree(left, ignore_errors=True)
        if ours:
            shutil.rmtree(left, ignore_errors=True)  # Windows does not remove files while they are open
            log.info("%s, left behind by a run that was killed, is removed.", left)


def _open_locked(path: Path) -> BinaryIO | None:
    """Open the file `path`, created if missing, locked until it is closed; None if another process has it locked."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        if _lock(file) is False:
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the previous lock owner has just removed it


def _lock(file: BinaryIO) -> bool | None:
    """True: this process now holds the lock. False: another one does. None: the file system has no locks."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return False if error.errno in HELD else None
    return True


def _take(content: Path, path: Path) -> bool:
    """Rename `content` to `path` atomically; False if `path` already exists."""
    try:
        if content.is_dir() or not fcntl:  # on Windows rename never overwrites, elsewhere it does for files
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
        path.open("xb").close()  # a file system without links: reserve the name first
        os.replace(content, path)
