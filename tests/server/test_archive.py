"""The archive that users install: it loads in a ComfyUI, its commands run, pip installs it, importing it is cheap."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import client as http
import host
import launch
import pytest
from stillmotion.nodes import NODES

PACK = host.PACK
LEFT_OUT = {line.strip("/") for line in (PACK / ".comfyignore").read_text().split()} | {"__pycache__", "build", "dist"}


def shipped():
    """The files that the archive holds, relative to the pack: hidden ones and those in .comfyignore are left out."""
    for path in sorted(PACK.rglob("*")):
        parts = path.relative_to(PACK).parts
        if path.is_file() and not any(part in LEFT_OUT or part.startswith(".") or part.endswith(".egg-info")
                                      for part in parts):
            yield Path(*parts)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "stillmotion.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in shipped():
            file.write(PACK / name, name)
    return path


@pytest.fixture(scope="module")
def unpacked(archive):
    folder = archive.parent / "custom_nodes" / "stillmotion"
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


def run(command, **options):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, **options)


def test_it_holds_no_tests_and_all_that_is_needed(unpacked):
    names = {str(name) for name in shipped()}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "nodes/demo/video_unet_demo.safetensors",
            "workflows/examples/stillmotion_start.png", "workflows/runner/host_constraints.txt"} <= names
    assert not [name for name in names if name.startswith(("tests", "results", "."))]


def test_it_loads_in_comfyui_and_its_commands_run(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "PACK", unpacked)
    with launch.Server(host.find_host(), threads=1) as server:
        found = http.Client(server.url, server).json("/object_info")
        assert len([name for name in found if name.startswith("Stillmotion_")]) == len(NODES)
        done = run([unpacked / "workflows" / "run.py", "--server", server.url, "--steps", "1", "--frames", "2"],
                   cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.mp4"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in (PACK / "workflows").glob("*.py")))
def test_every_command_starts_without_the_tests(unpacked, name):
    done = run([unpacked / "workflows" / name, "--help"])
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name}"), done.stderr


def test_train_demo_begins_to_train_without_the_tests(unpacked, tmp_path):
    command = [sys.executable, unpacked / "workflows" / "train_demo.py", "--family", "early", "--folder",
               tmp_path / "state", "--output", tmp_path / "early.safetensors"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "INFO" in line or any(word in line for word in ("encod", "clips", "step")):
                break
        assert process.poll() is None and "Traceback" not in "".join(lines), "".join(lines)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(find_spec("setuptools") is None, reason="this Python has no setuptools")
def test_pip_installs_it_as_the_library(archive, unpacked, tmp_path):
    target = tmp_path / "site"
    done = run(["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile", "--target", target,
                archive])
    assert done.returncode == 0, done.stderr
    installed = {str(path.relative_to(target / "stillmotion")) for path in (target / "stillmotion").rglob("*")
                 if path.is_file()}
    assert installed >= {str(name) for name in shipped() if name.parts[0] in ("nodes", "web", "workflows")}
    code = ("import sys, stillmotion; from stillmotion import DynamiCrafterImg2VideoPipeline, save_video\n"
            "print(stillmotion.__file__); print({'torch', 'aiohttp', 'host', 'client'} & set(sys.modules))")
    done = run(["-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)})
    assert done.stdout.splitlines() == [str(target / "stillmotion" / "__init__.py"), "set()"], done.stderr


IMPORT = """
import asyncio, importlib.util, json, os, sys, time
comfyui, pack, base = sys.argv[1:]
sys.argv, sys.path[0] = sys.argv[:1], comfyui
from comfy.cli_args import args
args.cpu, args.base_directory, args.disable_api_nodes = True, base, True
import utils.extra_config, folder_paths, nodes, server, execution, comfy_api.latest  # what ComfyUI has by then
server.PromptServer(asyncio.new_event_loop())
sys.dont_write_bytecode = True
done = {"import": [], "entry": []}

def watch(event, given):
    writes = event == "open" and isinstance(given[0], str) and (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "subprocess.Popen",
                           "os.posix_spawn", "os.system", "socket.connect", "socket.getaddrinfo"):
        done[stage].append(f"{event} {given[0]}")

stage = "import"
sys.addaudithook(watch)
begin = time.process_time()
spec = importlib.util.spec_from_file_location("custom_nodes.pack", f"{pack}/__init__.py",
                                              submodule_search_locations=[pack])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
stage = "entry"
extension = asyncio.run(module.comfy_entrypoint())
stage = "import"
count = len(asyncio.run(extension.get_node_list()))
print(json.dumps({"seconds": time.process_time() - begin, "nodes": count, **done}))
"""


def test_importing_it_is_quick_and_does_nothing_else(unpacked, tmp_path):
    (tmp_path / "input").mkdir()
    done = run(["-c", IMPORT, host.find_host().comfyui, unpacked, tmp_path])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["nodes"] == len(NODES) and found["import"] == []
    # the examples of the templates, in the input folder of the ComfyUI, and nothing elsewhere
    elsewhere = [entry for entry in found["entry"] if str(tmp_path / "input") not in entry]
    assert elsewhere == [] and (tmp_path / "input" / "stillmotion_start.png").is_file()
    assert found["seconds"] < 1, found
