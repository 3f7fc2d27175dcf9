"""Batches: servers and the runner are killed at random moments, and every video is made once, bit for bit."""
import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import av
import host
import launch
import pytest
import ray_workers

pytestmark = pytest.mark.skipif("STILLMOTION_SERVER" in os.environ, reason="needs servers of its own")
EXAMPLES = [host.WORKFLOWS / "examples" / f"stillmotion_{name}.png" for name in ("start", "star")]
SAVE = {"class_type": "Stillmotion_SaveVideo", "_meta": {"title": "Save"},
        "inputs": {"images": ["3", 0], "filename_prefix": "batch/clip", "fps": 8.0, "format": "mp4", "crf": 16}}
PLAIN = {"1": {"class_type": "LoadImage", "inputs": {"image": "none.png"}},
         "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "upscale_method": "bilinear", "width": 256,
                                                      "height": 256, "crop": "disabled"}},
         "3": {"class_type": "RepeatImageBatch", "inputs": {"image": ["2", 0], "amount": 40}}, "4": SAVE}


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


def plain_rows(count):
    return [{"name": f"clip{i:02}", "LoadImage.image": EXAMPLES[i % 2], "ImageScale.width": 200 + 8 * i}
            for i in range(count)]


def sampled(folder):
    """The `animate` graph, short."""
    made = json.loads((host.WORKFLOWS / "api" / "animate.json").read_text())
    made["5"]["inputs"]["frames"], made["6"]["inputs"]["steps"] = 4, 3
    (folder / "graph.json").write_text(json.dumps(made))
    return folder / "graph.json"


def sampled_rows(count):
    return [{"name": f"clip{i:02}", "LoadImage.image": EXAMPLES[i % 2], "Stillmotion_DDIMSampler.seed": i,
             "Prompt.text": f"a {('red', 'green', 'blue')[i % 3]} circle moves up on a white background"}
            for i in range(count)]


def start(*arguments, cwd, python=None, **environment):
    environment = dict(os.environ, PYTHONUNBUFFERED="1", **environment)
    return subprocess.Popen([python or sys.executable, str(host.WORKFLOWS / "run.py"), *map(str, arguments)], cwd=cwd,
                            env=environment, stdout=open(cwd / "log.txt", "a"), stderr=subprocess.STDOUT)


def run(*arguments, cwd, **environment):
    done = subprocess.run([sys.executable, str(host.WORKFLOWS / "run.py"), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=600, env=dict(os.environ, **environment))
    return done.stdout, done.stderr, done.returncode


class Servers:
    """Servers that can be killed and come back at another address; `file` lists those that run."""

    def __init__(self, count, folder):
        self.file, self.lock = folder / "workers.txt", threading.Lock()
        self.running, self.threads = [None] * count, []
        self._together(self._make, range(count))
        self._write()

    def _together(self, work, indices):
        threads = [threading.Thread(target=work, args=(i,)) for i in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _make(self, index):
        self.running[index] = launch.Server(host.find_host(), "cpu", threads=1)

    def _write(self):
        with self.lock:
            text = "".join(f"{server.url}\n" for server in self.running if server and server.alive())
            (self.file.parent / "new.txt").write_text("# servers\n" + text)
            os.replace(self.file.parent / "new.txt", self.file)

    def kill(self, index):
        """Kill a server and start it again, empty, which takes seconds."""
        server = self.running[index]
        server.process.kill()
        server.process.wait()
        server.stop()
        thread = threading.Thread(target=lambda: (self._make(index), self._write()))
        thread.start()
        self.threads.append(thread)

    def stop(self):
        for thread in self.threads:
            thread.join()
        self._together(lambda i: self.running[i].stop(), [i for i, server in enumerate(self.running) if server])


def batch_of(out):
    """{name: row} of the list."""
    with sqlite3.connect(f"file:{out}.batch/jobs.sqlite?mode=ro", uri=True, timeout=60) as db:
        db.row_factory = sqlite3.Row
        return {row["name"]: dict(row) for row in db.execute("SELECT * FROM jobs")}


def survive(command, out, count, kills, cwd, rng, environment=None):
    """Run a batch; at random moments do each of `kills` ("runner", or a call). Returns the number of runners."""
    environment, runners = environment or {}, 1
    process = start(*command, "--output", out, cwd=cwd, **environment)
    moments = sorted((rng.uniform(0.1, 0.8) * count, i) for i in range(len(kills)))
    rng.shuffle(kills)
    for moment, i in moments:
        while len(list(out.glob("*.mp4"))) < moment:
            assert process.poll() is None, (cwd / "log.txt").read_text()
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        if kills[i] != "runner":
            kills[i]()
            continue
        process.kill()
        process.wait()
        for path in out.iterdir():  # whole or not there
            if path.suffix == ".mp4":
                with av.open(str(path)) as container:
                    assert "prompt" in container.metadata and list(container.decode(video=0))
        process, runners = start("resume", out, cwd=cwd, **environment), runners + 1
    assert process.wait(600) == 0, (cwd / "log.txt").read_text()
    return runners


def check(out, reference, count):
    """Every video is there once, with the reference's bytes, and nothing else."""
    assert [path.name for path in sorted(out.iterdir())] == [f"clip{i:02}.mp4" for i in range(count)]
    for path in out.iterdir():
        assert path.read_bytes() == (reference / path.name).read_bytes(), path.name
    found = batch_of(out)
    assert len(found) == count and all(row["state"] == "done" for row in found.values())
    return found


def one_server(graph, table, folder, *flags):
    text, errors, code = run("batch", graph, "--over", table, "--output", folder / "one", *flags, cwd=folder)
    assert code == 0, text + errors
    return folder / "one"


def test_servers_and_runner_are_killed_and_every_video_is_made_once(tmp_path):
    rng, count = Random(os.urandom(4)), 8
    (tmp_path / "graph.json").write_text(json.dumps(PLAIN))
    table = write_table(tmp_path / "table.csv", plain_rows(count))
    servers = Servers(2, tmp_path)
    try:
        reference = one_server(tmp_path / "graph.json", table, tmp_path, "--server", servers.running[0].url)
        kills = ["runner", "runner", lambda: servers.kill(0), lambda: servers.kill(1)]
        survive(["batch", tmp_path / "graph.json", "--over", table, "--workers", servers.file], tmp_path / "out", count,
                kills, tmp_path, rng)
    finally:
        servers.stop()
    found = check(tmp_path / "out", reference, count)
    assert sum(row["attempts"] for row in found.values()) <= count + 2 + 2 * 2  # what was not lost is not made again


@pytest.mark.slow
def test_sixty_jobs_on_three_servers(tmp_path):
    rng, count = Random(os.urandom(4)), 60
    graph, table = sampled(tmp_path), write_table(tmp_path / "table.csv", sampled_rows(count))
    servers = Servers(3, tmp_path)
    try:
        reference = one_server(graph, table, tmp_path, "--server", servers.running[0].url)
        kills = ["runner", "runner", *(lambda i=i: servers.kill(i) for i in range(3))]
        survive(["batch", graph, "--over", table, "--workers", servers.file], tmp_path / "out", count, kills, tmp_path,
                rng)
    finally:
        servers.stop()
    found = check(tmp_path / "out", reference, count)
    assert sum(row["attempts"] for row in found.values()) <= count + 3 + 3 * 2


def descendants(pid):
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.skipif(not (ray_workers.environment() / host.MANIFEST).is_file(), reason="Ray is not installed: "
                    "run.py batch --ray --install_ray installs it")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the process table of Linux")
def test_sixty_jobs_on_a_ray_cluster_with_two_actors(tmp_path):
    rng, count = Random(os.urandom(4)), 60
    graph, table = sampled(tmp_path), write_table(tmp_path / "table.csv", sampled_rows(count))
    reference = one_server(graph, table, tmp_path)
    killed = []

    def kill_an_actor():
        actors = [pid for pid in descendants(os.getpid()) if command_of(pid).startswith("ray::Actor")]
        killed.append(rng.choice(actors))
        os.kill(killed[-1], 9)

    kills = ["runner", "runner", kill_an_actor, kill_an_actor]
    survive(["batch", graph, "--over", table, "--ray", "--ray_workers", "2"], tmp_path / "out", count, kills, tmp_path,
            rng)
    assert len(killed) == 2
    check(tmp_path / "out", reference, count)
    left = [command_of(pid) for pid in descendants(os.getpid())]
    assert [command for command in left if "ray" in command.split("/")[-1]] == []


@pytest.mark.slow
def test_a_long_video_goes_on_from_its_blocks(tmp_path):
    made = json.loads((host.WORKFLOWS / "api" / "causal_text_to_video.json").read_text())
    made["6"]["inputs"]["resume_folder"] = "long"
    (tmp_path / "graph.json").write_text(json.dumps(made))
    for name in ("whole", "out"):
        process = start("batch", "graph.json", "--output", name, cwd=tmp_path)
        blocks = tmp_path / f"{name}.batch" / "server" / "long"
        while name == "out" and len(list(blocks.rglob("block_*.safetensors"))) < 2:
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.02)
        if name == "out":
            before = {path: path.stat().st_mtime_ns for path in blocks.rglob("block_*.safetensors")}
            child, = (pid for pid in descendants(process.pid) if "guard.py" in command_of(pid))
            os.kill(child, 9)
        assert process.wait(300) == 0, (tmp_path / "log.txt").read_text()
    assert len(list(blocks.rglob("block_*.safetensors"))) > len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "whole" / "graph.mp4").read_bytes() == (tmp_path / "out" / "graph.mp4").read_bytes()


# ---- one server ----

def test_a_job_that_fails_is_named_and_tried_again(server, tmp_path):
    """Exit codes, JSON, summary, contact sheet; a second submission makes nothing anew."""
    (tmp_path / "graph.json").write_text(json.dumps(PLAIN))
    rows = plain_rows(3)
    shutil.copy(EXAMPLES[0], tmp_path / "own.png")
    rows[1] |= {"ImageScale.width": -5}
    rows[2] |= {"LoadImage.image": "own.png"}  # seen from the table's folder
    table = write_table(tmp_path / "table.csv", rows)
    command = ["batch", "graph.json", "--over", "table.csv", "--server", server.url, "--retries", "1", "--json"]
    text, errors, code = run(*command, cwd=tmp_path)
    found = json.loads(text)
    assert code == 1 and (found["done"], found["failed"]) == (2, 1), errors
    failure, = found["failures"]
    assert failure["name"] == "clip01" and failure["attempts"] == 2 and "ImageScale" in failure["error"]
    summary = {row["name"]: row for row in csv.DictReader(open(found["summary"], newline=""))}
    assert float(summary["clip00"]["seconds"]) > 0 and float(summary["clip00"]["memory_mb"]) > 0
    assert summary["clip01"]["error"] == failure["error"] and Path(found["sheets"][0]).stat().st_size > 1000
    out = tmp_path / "results" / "graph"
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(before) == ["clip00.mp4", "clip02.mp4"]
    assert json.loads(run("status", out, "--json", cwd=tmp_path)[0])["failures"][0]["name"] == "clip01"

    rows[1] |= {"ImageScale.width": 64}
    write_table(table, rows)
    (out / "clip02.mp4").unlink()
    text, errors, code = run(*command, cwd=tmp_path)
    assert code == 0 and "1 new, 2 already listed" in errors and "1 results are gone" in errors, errors
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(after) == ["clip00.mp4", "clip01.mp4", "clip02.mp4"] and after["clip00.mp4"] == before["clip00.mp4"]
    text, errors, code = run("retry", out, "--failed", cwd=tmp_path)
    assert code == 0 and "0 failed jobs wait again" in text and "3 of 3 jobs are done" in text, text + errors


def test_a_folder_of_pictures_over_any_graph(server, client, tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(PLAIN))
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        shutil.copy(EXAMPLES[0], folder / f"photo{i}.png")  # the same bytes
    text, errors, code = run("batch", "graph.json", "--over", folder, "--set", "Save.fps=4", "--server", server.url,
                             "--output", "made", cwd=tmp_path)
    assert code == 0, text + errors
    made = sorted((tmp_path / "made").iterdir())
    assert [path.name for path in made] == ["photo0.mp4", "photo1.mp4", "photo2.mp4"]
    with av.open(str(made[0])) as container:
        assert container.streams.video[0].average_rate == 4
        name = json.loads(container.metadata["prompt"])["1"]["inputs"]["image"]
    uploaded = [path.name for path in (server.base / "input").iterdir() if path.name.startswith(name[:24])]
    assert uploaded == [name]  # once, by its hash


@pytest.mark.slow
def test_the_private_server_comes_back(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(PLAIN))
    table = write_table(tmp_path / "table.csv", plain_rows(4))
    process = start("batch", "graph.json", "--over", table, "--output", tmp_path / "out", cwd=tmp_path)
    while not list((tmp_path / "out").glob("*.mp4")):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    child, = (pid for pid in descendants(process.pid) if "guard.py" in command_of(pid))
    os.kill(child, 9)
    code, text = process.wait(300), (tmp_path / "log.txt").read_text()
    assert code == 0 and "goes back to the list" in text, text
    assert len(list((tmp_path / "out").iterdir())) == 4
