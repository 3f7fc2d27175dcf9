"""run.py fetch against a model host on loopback that breaks off, lies and redirects."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fetch
import host
import pytest
from known_models import KNOWN, File

DATA = os.urandom(100_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
MODEL = File("maker/model", "model.ckpt", "checkpoints", "m.ckpt", None)


class ModelHost:
    """Serves DATA under every path; the attributes choose what goes wrong."""

    def __init__(self):
        self.cuts = 0          # answers that end in the middle
        self.ranges = True     # parts can be asked for
        self.redirects = []    # answers with these first: (status, Location)
        self.linked = {}       # headers about the file, sent with redirects and answers
        self.headers = {}
        self.status = 200
        self.data, self.tag = DATA, '"one"'
        self.asked, self.sent = [], 0

    def answer(self, request):
        asked = request.headers.get("Range")
        self.asked.append((request.path, asked))
        if self.redirects:
            status, location = self.redirects.pop(0)
            return self.reply(request, status, {"Location": location, **self.linked})
        if self.status != 200:
            return self.reply(request, self.status, {})
        first, last = 0, len(self.data) - 1
        if asked and self.ranges:
            first, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            first, last = int(first), int(end or last)
        part = self.data[first:last + 1]
        headers = {"Content-Length": len(part), "ETag": self.tag, **self.linked, **self.headers}
        if asked and self.ranges:
            headers = {"Content-Range": f"bytes {first}-{last}/{len(self.data)}", **headers}
        if len(part) > 1 and self.cuts:
            self.cuts -= 1
            part = part[:len(part) // 2]
        self.sent += len(part)
        self.reply(request, 206 if asked and self.ranges else 200, headers, part)

    def reply(self, request, status, headers, body=b""):
        request.send_response(status)
        for name, value in headers.items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)
        request.close_connection = True


@pytest.fixture
def model_host(monkeypatch):
    served = ModelHost()
    handler = type("Handler", (BaseHTTPRequestHandler,), {
        "do_GET": lambda request: served.answer(request), "log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}/maker/model.ckpt"
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0)
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def target(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "m.ckpt"


def left(target):
    return sorted(path.name for path in target.parent.iterdir())


def test_a_file_arrives_whole_and_is_not_fetched_twice(model_host, target):
    assert fetch.fetch(model_host.url, target, MODEL) == "saved"
    assert target.read_bytes() == DATA and left(target) == ["m.ckpt"]
    assert fetch.fetch(model_host.url, target, MODEL) == "there already"
    assert len(model_host.asked) == 2  # what it is, and the file
    with pytest.raises(host.HostError, match="is there already, and is not the published file"):
        fetch.fetch(model_host.url, target, MODEL._replace(sha256="0" * 64))
    assert target.read_bytes() == DATA


def test_a_broken_connection_goes_on_where_it_was(model_host, target, capsys):
    model_host.cuts = 7
    fetch.fetch(model_host.url, target, MODEL._replace(sha256=SHA256))
    assert target.read_bytes() == DATA and model_host.sent == len(DATA) + 8  # nothing twice, but the 8 questions
    assert "broke off after 50000 of 100000 bytes; once more" in capsys.readouterr().err


def test_a_stopped_download_is_gone_on_with_by_the_next_command(model_host, target, monkeypatch):
    model_host.cuts = 1
    monkeypatch.setattr(fetch, "TRIES", 1)
    monkeypatch.setattr(fetch, "show", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(model_host.url, target, MODEL)
    monkeypatch.undo()
    assert left(target) == [".m.ckpt.fetch"]
    model_host.cuts = 0
    assert fetch.fetch(model_host.url, target, MODEL) == "saved"
    assert target.read_bytes() == DATA and model_host.asked[-1][1] == "bytes=50000-"


def test_another_version_of_the_file_is_not_mixed_with_the_first(model_host, target, monkeypatch):
    model_host.cuts = 99
    monkeypatch.setattr(fetch, "TRIES", 1)
    monkeypatch.setattr(fetch, "receive", lambda remote, content, begin: content.write_bytes(b"old") and
                        (_ for _ in ()).throw(host.HostError("stopped")))
    with pytest.raises(host.HostError, match="stopped"):
        fetch.fetch(model_host.url, target, MODEL)
    monkeypatch.undo()
    model_host.cuts, model_host.tag = 0, '"two"'
    fetch.fetch(model_host.url, target, MODEL)
    assert target.read_bytes() == DATA and left(target) == ["m.ckpt"]


def test_a_host_that_knows_no_ranges_sends_all_again(model_host, target):
    model_host.ranges, model_host.cuts = False, 1
    fetch.fetch(model_host.url, target, MODEL)
    assert target.read_bytes() == DATA


def test_a_host_that_is_gone_is_given_up(model_host, target, monkeypatch):
    model_host.status = 503
    with pytest.raises(host.HostError, match="answers with the error 503. What has arrived is kept"):
        fetch.fetch(model_host.url, target, MODEL)
    assert len(model_host.asked) == fetch.TRIES and not target.exists()


@pytest.mark.parametrize("lie, words", [
    ({"linked": {"X-Linked-Size": "5"}}, "the host says that the file has 5 bytes, and then sends 100000"),
    ({"headers": {"Content-Length": None, "Content-Range": "bytes 0-0/100"}}, "sends more than the 100 bytes"),
    ({"headers": {"Content-Range": "bytes 7-8/100000"}, "linked": {"X-Linked-Size": "100000"}, "kept": b"x" * 50},
     "sends another part of the file"),
    ({"linked": {"X-Linked-Etag": f'"{"0" * 64}"'}}, "what arrived has the SHA-256 [0-9a-f]{64}, expected 0000"),
    ({"linked": {"X-Linked-Etag": f'"{"0" * 64}"'}, "known": "1" * 64}, "holds another file than the known one"),
    ({"known": "1" * 64}, f"has the SHA-256 {SHA256}, expected 1111"),
    ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "is a web page, not a model"),
    ({"ranges": False, "headers": {"Content-Length": None}}, "does not say how large the file is"),
    ({"status": 404}, "answers with 404: there is no such file"), ({"status": 401}, "401: it wants a login"),
    ({"redirects": [(302, "/again")] * 9}, "more than 5 redirects"),
    ({"redirects": [(302, "file:///etc/passwd")]}, "redirects to file:///etc/passwd, which is no web address"),
    ({"redirects": [(302, None)]}, "redirects to nowhere"),
])
def test_what_a_host_must_not_do(model_host, target, monkeypatch, lie, words):
    known = MODEL._replace(sha256=lie.pop("known", None))
    kept = lie.pop("kept", None)
    for name, value in lie.items():
        setattr(model_host, name, value)
    if kept:
        part = target.parent / ".m.ckpt.fetch"
        part.mkdir()
        monkeypatch.setattr(fetch, "name_of", lambda remote: "x.bytes")
        (part / "x.bytes").write_bytes(kept)
    with pytest.raises(host.HostError, match=words):
        fetch.fetch(model_host.url, target, known)
    assert not target.exists() and DATA not in [path.read_bytes() for path in target.parent.rglob("*.bytes")]


def test_redirects_are_followed_and_checked(model_host, target):
    model_host.redirects, model_host.linked = [(302, "/store/1"), (307, "2")], {"X-Linked-Etag": f'"{SHA256}"'}
    fetch.fetch(model_host.url, target, MODEL)
    assert target.read_bytes() == DATA and model_host.asked[-1] == ("/store/2", None)
    for old, new, words in (("https://a.example/x", "http://a.example/x", "not encrypted"),
                            ("http://a.example/x", "http://127.0.0.1/x", "redirects to this machine")):
        with pytest.raises(fetch.NoFile, match=words):
            fetch.follow(old, new)


def test_no_space_is_said_before_anything_arrives(model_host, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(host.HostError, match="0.0 GB free, and 0.0 GB are to come. Free some space"):
        fetch.fetch(model_host.url, target, MODEL)


def test_the_command(model_host, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, host.WORKFLOWS / "run.py", "fetch", *arguments], capture_output=True,
                              text=True, env={**os.environ, "STILLMOTION_MODEL_HOST": model_host.url.rsplit("/", 2)[0]})

    done = run("longlive", "--models", tmp_path)
    files = [tmp_path / "diffusion_models" / "longlive_base.pt", tmp_path / "loras" / "longlive_lora.pt"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"saved: {file}" for file in files]
    assert [file.read_bytes() == DATA for file in files] == [True, True]
    assert [path for path, _ in model_host.asked[::2]] == [
        "/Efficient-Large-Model/LongLive-1.3B/resolve/main/models/longlive_base.pt",
        "/Efficient-Large-Model/LongLive-1.3B/resolve/main/models/lora.pt"]
    assert "longlive " in run().stdout and len(run().stdout.splitlines()) == len(KNOWN)
    assert run("other").returncode == 2
    assert run("causvid", "--comfyui", tmp_path).stderr.startswith(f"error: {tmp_path} is not a ComfyUI folder")


def test_the_known_files_are_those_of_the_documentation():
    text = "\n".join((host.PACK / name).read_text() for name in ("README.md", "web/pages/models.md"))
    files = [file for _, files in KNOWN.values() for file in files]
    assert [file.repository for file in files if file.repository not in text] == []
    assert len({(file.folder, file.name) for file in files}) == len(files)
