"""Building and repairing the private host, with a build of two small files instead of ComfyUI."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import host
import pytest


class Recipe:
    """A build that counts its runs and can fail halfway."""

    def __init__(self):
        self.built = 0
        self.fails = False

    def __call__(self, folder):
        self.built += 1
        (folder / "venv").mkdir()
        (folder / "venv" / "package.py").write_text("value = 1\n")
        if self.fails:
            raise host.HostError("no network")
        (folder / "main.py").write_text("print('ready')\n")


@pytest.fixture
def recipe():
    return Recipe()


def ensure(folder, recipe, works=lambda folder: True):
    host.ensure(folder, recipe, works)


def test_a_sound_host_is_built_once(tmp_path, recipe):
    ensure(tmp_path / "h", recipe)
    ensure(tmp_path / "h", recipe)
    assert recipe.built == 1


def test_a_half_made_host_is_rebuilt(tmp_path, recipe):
    recipe.fails = True
    with pytest.raises(host.HostError, match="no network"):
        ensure(tmp_path / "h", recipe)
    recipe.fails = False
    ensure(tmp_path / "h", recipe)
    assert recipe.built == 2
    assert (tmp_path / "h" / "main.py").exists()


@pytest.mark.parametrize("spoil", [
    lambda h: (h / "venv" / "package.py").unlink(),
    lambda h: (h / "main.py").write_text("pri"),
    lambda h: (h / host.MANIFEST).unlink(),
], ids=["missing file", "truncated file", "no manifest"])
def test_a_broken_host_is_rebuilt(tmp_path, recipe, spoil):
    ensure(tmp_path / "h", recipe)
    spoil(tmp_path / "h")
    ensure(tmp_path / "h", recipe)
    assert recipe.built == 2
    assert (tmp_path / "h" / "main.py").read_text() == "print('ready')\n"


def test_a_host_whose_python_fails_is_rebuilt(tmp_path, recipe):
    ensure(tmp_path / "h", recipe)
    ensure(tmp_path / "h", recipe, works=lambda folder: recipe.built == 2)
    assert recipe.built == 2


def test_what_running_leaves_behind_does_no_harm(tmp_path, recipe):
    ensure(tmp_path / "h", recipe)
    (tmp_path / "h" / "__pycache__").mkdir()
    (tmp_path / "h" / "__pycache__" / "main.pyc").write_text("x")
    (tmp_path / "h" / "notes.txt").write_text("added by hand")
    ensure(tmp_path / "h", recipe)
    assert recipe.built == 1


def test_two_processes_build_one_host(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(host.RUNNER)!r})
import host
def build(folder):
    with open({str(tmp_path / "builds")!r}, "a") as f: f.write("x")
    time.sleep(0.7)
    (folder / "main.py").write_text("done")
host.ensure(Path({str(tmp_path / "h")!r}), build, lambda folder: True)
assert (Path({str(tmp_path / "h")!r}) / "main.py").read_text() == "done"
"""
    runs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [r.wait(60) for r in runs] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_a_killed_builder_leaves_no_lock(tmp_path, recipe):
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(host.RUNNER)!r})
import host
def build(folder):
    (folder / "half").write_text("x")
    print("building", flush=True)
    time.sleep(60)
host.ensure(Path({str(tmp_path / "h")!r}), build, lambda folder: True)
"""
    builder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "building\n"
    builder.kill()
    builder.wait()
    ensure(tmp_path / "h", recipe)  # a lock that stays would be waited for without end
    assert recipe.built == 1 and not (tmp_path / "h" / "half").exists()


def test_every_pin_changes_the_folder():
    pins = host.pins("cpu")
    keys = {host.key(pins)} | {host.key({**pins, name: "other"}) for name in pins}
    assert len(keys) == 1 + len(pins)
    assert host.key(host.pins("cpu")) == host.key(pins)
    assert host.key(host.pins("cuda")) != host.key(pins)


def test_torch_is_not_replaced_by_what_the_pack_adds():
    pinned = host.CONSTRAINTS.read_text().split()
    for requirement in [host.TORCH["cpu"], *host.TORCH_FAMILY]:
        assert requirement in pinned
    ours = (host.PACK / "requirements.txt").read_text().split()
    assert not {"torch", "numpy", "transformers"} & set(ours)
    assert set(ours) <= set(host.PACKAGES)


def test_the_private_host_has_the_optional_extras():
    extras = tomllib.loads((host.PACK / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = [line.partition("==")[0].lower() for line in host.CONSTRAINTS.read_text().splitlines()]
    for package in extras["train"] + extras["shards"] + extras["evaluate"]:
        assert package in host.PACKAGES and package in pinned


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("STILLMOTION_HOST", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert host.cache_folder() == tmp_path / "stillmotion"
    monkeypatch.setenv("STILLMOTION_HOST", str(tmp_path / "elsewhere"))
    assert host.cache_folder() == tmp_path / "elsewhere"


def test_a_script_started_again_knows_the_variant_of_its_host(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(host.os, "execve", lambda python, command, environment: started.append(environment))
    monkeypatch.setattr(host, "find_host", lambda comfyui: host.Host("python", tmp_path, "cpu"))
    monkeypatch.delenv("STILLMOTION_COMFYUI", raising=False)
    host.reexec()
    monkeypatch.undo()
    for name in ("STILLMOTION_COMFYUI", "STILLMOTION_VARIANT"):
        monkeypatch.setenv(name, started[0][name])
    assert host.find_host() == (Path(sys.executable), tmp_path, "cpu")
    monkeypatch.setenv("STILLMOTION_VARIANT", "")
    assert host.find_host() == host.Host(Path(sys.executable), tmp_path)


def test_an_existing_comfyui_is_checked_not_changed(tmp_path, monkeypatch):
    with pytest.raises(host.HostError, match="no main.py"):
        host.existing_host(tmp_path)
    (tmp_path / "main.py").write_text("")
    empty = tmp_path / "empty-python"
    empty.write_text(f"#!/bin/sh\nexec {sys.executable} -S \"$@\"\n")
    empty.chmod(0o755)
    monkeypatch.setattr(host, "python_of", lambda comfyui: empty)
    with pytest.raises(host.HostError) as error:
        host.existing_host(tmp_path)
    assert f"{empty} -m pip install -r {tmp_path / 'requirements.txt'} -r {host.PACK / 'requirements.txt'}" in str(
        error.value)


def test_an_old_python_is_told_so():
    code = (f"import sys; sys.path.insert(0, {str(host.RUNNER)!r}); import host\n"
            "sys.version_info = (3, 10, 4)\nhost.check_python()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "need Python 3.11 or newer" in done.stderr


def test_constraints_name_each_package_once():
    names = [line.split("==")[0].lower().replace("_", "-")
             for line in host.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert len(set(names)) == len(names)


def test_manifest_lists_files_with_sizes(tmp_path, recipe):
    ensure(tmp_path / "h", recipe)
    manifest = json.loads((tmp_path / "h" / host.MANIFEST).read_text())
    assert manifest == {str(Path("venv") / "package.py"): 10, "main.py": 15}
