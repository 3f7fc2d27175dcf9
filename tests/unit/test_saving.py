"""Atomic file writes: names already taken, symlinks, writers that were killed or are still running."""
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stillmotion.nodes.common import saving
from stillmotion.nodes.common.saving import NewName, holding, new_file, remove_leftovers, short_name, write_file

SOURCE = Path(saving.__file__)


def other_process(code, *arguments):
    """Start another process; when this returns, it has run `code` and is waiting."""
    text = (f"import importlib.util, sys; spec = importlib.util.spec_from_file_location('saving', {str(SOURCE)!r})\n"
            "saving = importlib.util.module_from_spec(spec); spec.loader.exec_module(saving)\n"
            f"from pathlib import Path\n{code}\nprint('ready', flush=True)\nsys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", text, *map(str, arguments)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


WRITING = ("work = saving.new_file(saving.NewName(Path(sys.argv[1]), 'clip', 1, '.mp4')); content = work.__enter__()\n"
           "content.write_bytes(b'half')")
HOLDING = "held = saving.holding(Path(sys.argv[1]), 'The folder'); held.__enter__()"


def end(process):
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.communicate()


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_name_that_is_taken_meanwhile_stays_with_the_other(tmp_path):
    name = NewName(tmp_path, "clip", 1, ".mp4")
    with new_file(name) as content:
        content.write_bytes(b"mine")
        for number in (1, 2):
            (tmp_path / f"clip_0000{number}_.mp4").write_bytes(b"the other's")
    assert name.path.name == "clip_00003_.mp4" and files(tmp_path) == {
        "clip_00001_.mp4": b"the other's", "clip_00002_.mp4": b"the other's", "clip_00003_.mp4": b"mine"}


def test_a_folder_takes_the_place_of_no_file_and_no_link(tmp_path):
    (tmp_path / "clip_00001_").write_bytes(b"the other's")
    (tmp_path / "clip_00002_").symlink_to(tmp_path / "nowhere")
    (tmp_path / "clip_00003_").mkdir()
    (tmp_path / "clip_00003_" / "frame").write_bytes(b"the other's")
    name = NewName(tmp_path, "clip", 1, "")
    with new_file(name) as content:
        content.mkdir()
        (content / "frame").write_bytes(b"mine")
    assert files(name.path) == {"frame": b"mine"} and name.number == 4
    assert files(tmp_path)["clip_00003_/frame"] == b"the other's"


def test_links_are_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    folder = tmp_path / "output"
    folder.mkdir()
    for name in ("clip_00001_.mp4", saving.LOCK):
        (folder / name).symlink_to(elsewhere)
    name = NewName(folder, "clip", 1, ".mp4")
    with new_file(name) as content:
        content.write_bytes(b"mine")
    with pytest.raises(OSError, match="could not save"), holding(folder, "The folder"):
        pass
    assert name.number == 2 and not elsewhere.exists()


def test_file_systems_without_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "clip_00001_.mp4").write_bytes(b"the other's")
    with new_file(NewName(tmp_path, "clip", 1, ".mp4")) as content:
        content.write_bytes(b"mine")
    assert files(tmp_path) == {"clip_00001_.mp4": b"the other's", "clip_00002_.mp4": b"mine"}


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    with other_process(WRITING, tmp_path) as other:
        monkeypatch.setattr(saving.fcntl, "flock", refuse)
        write_file(tmp_path / "x", b"mine")  # other processes' temp files are kept: the writer may be alive
        assert sum(path.name == "content" for path in tmp_path.rglob("*")) == 1
        end(other)


def test_what_a_killed_process_wrote_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    with other_process(WRITING, tmp_path) as living, other_process(WRITING, tmp_path) as killed:
        assert len(list(tmp_path.iterdir())) == 2
        end(killed)
        write_file(tmp_path / "x", b"mine")
        left = [path for path in tmp_path.iterdir() if path.name != "x"]
        assert len(left) == 1 and (left[0] / "content").read_bytes() == b"half"
        end(living)
    remove_leftovers(tmp_path)
    assert files(tmp_path) == {"x": b"mine"}


def test_an_error_leaves_nothing(tmp_path):
    for make in (Path.mkdir, lambda path: path.write_bytes(b"half")):
        with pytest.raises(KeyboardInterrupt), new_file(NewName(tmp_path, "clip", 1, "")) as content:
            make(content)
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_by_one_process_and_freed_by_its_end(tmp_path):
    folder = tmp_path / "runs"
    with other_process(HOLDING, folder) as other:
        with pytest.raises(ValueError, match=rf"The folder .*runs is in use by process {other.pid} on .*Wait"):
            with holding(folder, "The folder"):
                pass
        end(other)
    with holding(folder, "The folder"):
        with pytest.raises(ValueError, match=f"process {os.getpid()} "), holding(folder, "The folder"):
            pass
    assert list(folder.iterdir()) == []


def test_writing_replaces_and_keeps_what_was_there_after_an_error(tmp_path, monkeypatch):
    write_file(tmp_path / "x", b"first")
    write_file(tmp_path / "x", b"second")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="could not save .*x: No space left.*Free space"):
        write_file(tmp_path / "x", b"third")
    assert files(tmp_path) == {"x": b"second"}


def test_a_short_name_is_allowed_on_every_system():
    assert short_name('a/b\\c:d*e?f"g<h>i|j\nk\x7f') == "a_b_c_d_e_f_g_h_i_j_k_"
    assert short_name("é" * 70) == "é" * 60 and short_name("cat 2.final") == "cat 2.final"
