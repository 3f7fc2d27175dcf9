"""The client against a faulty loopback server: every error is one sentence, no partial files are left."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import client
import commands
import errors
import host
import launch
import pytest
import transport
from fake_comfyui import asked, queued

ENTRY = {"filename": "v.mp4", "subfolder": "", "type": "output"}
DONE = {"status": {"messages": []}, "outputs": {"1": {"images": [ENTRY]}}}
GRAPH = {"1": {"class_type": "Save", "inputs": {}}}


# ---- addresses ----

def test_a_password_is_used_and_never_shown(fake):
    fake.answers["/object_info"] = {}
    one = client.Client(fake.url.replace("://", "://me:s%40cret@"))
    one.json("/object_info")
    assert one.url == fake.url
    sent = fake.seen[-1][2]["Authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"me:s@cret"
    fake.answers["/object_info"] = (401, {}, b"")
    with pytest.raises(client.ServerGone, match="wants a name and a password") as error:
        one.json("/object_info")
    assert "cret" not in str(error.value)


@pytest.mark.parametrize("address", ["ftp://a:secret@b", "http://", "http://a:secret@b:port", "http://[::1", "http://:80",
                                     "http://me:se/cret@host", "me:secret@"])
def test_addresses_that_are_none(address):
    with pytest.raises(client.ServerGone, match="http://NAME:PASSWORD@HOST") as error:
        client.Client(address)
    assert "secret" not in str(error.value)


def test_addresses_of_all_forms():
    assert client.Client("127.0.0.1:8188").url == "http://127.0.0.1:8188"
    assert client.Client("https://[::1]:80/comfy/").url == "https://[::1]:80/comfy"


# ---- responses ----

def test_a_server_that_was_never_there_is_gone(monkeypatch):
    monkeypatch.setattr(client, "GONE_AFTER_SECONDS", 1)
    with pytest.raises(client.ServerGone, match="Is ComfyUI still running there"):
        client.Client(f"http://127.0.0.1:{launch.free_port()}").run({})


@pytest.mark.parametrize("answer, words", [
    (b"<html>", "gave something else"), (b"null", "gave something else"), (b"[]", "gave something else"),
    ((500, {}, b"boom \x1b[31m"), "/object_info answers with the error 500: boom $"),
    ((302, {"Location": "http://example.com/x"}, b""), "sends us to http://example.com/x, which is not followed"),
    (b"[" * 100_000, "gave something else"),
])
def test_answers_that_are_not_comfyuis(fake, answer, words):
    fake.answers["/object_info"] = answer
    with pytest.raises(client.StrangeServer, match=words):
        client.Client(fake.url).json("/object_info", kind=dict)
    assert len(fake.seen) == 1


def test_an_answer_without_end_is_left(fake, monkeypatch):
    monkeypatch.setattr(transport, "LARGEST_ANSWER", 1 << 20)
    sent = []

    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while len(sent) < 1000:
                handler.wfile.write(b" " * (1 << 16))
                sent.append(1)
        except OSError:
            pass
    fake.answers["/object_info"] = endless
    with pytest.raises(client.StrangeServer, match="has no end: more than 1048576 bytes"):
        client.Client(fake.url).json("/object_info")
    assert len(sent) < 1000


def test_a_slow_answer_is_given_up(fake):
    fake.answers["/object_info"] = lambda handler: time.sleep(1)
    with pytest.raises(client.ServerGone, match="within 0.3 s"):
        client.Client(fake.url).json("/object_info", seconds=0.3)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_the_first_ctrl_c_is_heard_while_a_server_hangs(fake):
    over = threading.Event()
    fake.answers["/object_info"] = lambda handler: over.wait(300)
    code = (f"import sys; sys.path.insert(0, {str(host.RUNNER)!r}); import client, signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler); print('go', flush=True)\n"
            f"client.Client({fake.url!r}).json('/object_info')")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "go\n"
    while not fake.seen:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        assert "KeyboardInterrupt" in process.communicate(timeout=200)[1]  # while the server still hangs
    finally:
        process.kill()
        over.set()


# ---- files ----

@pytest.mark.parametrize("answer, words", [
    ((200, {"Content-Length": 1000}, b"half"), "broke off in the middle"),
    (b"", "an empty file"), ((404, {}, b""), "error 404"),
    (lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\nbytes") and None, "how long a file is"),
])
def test_a_download_is_whole_or_not_there(fake, tmp_path, monkeypatch, answer, words):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    fake.answers["/view"] = answer
    with pytest.raises(client.ServerGone, match=words):
        client.Client(fake.url).download(ENTRY, tmp_path / "deep" / "video.mp4")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_finished_file_is_replaced_only_when_asked(fake, tmp_path):
    one, path = client.Client(fake.url), tmp_path / "video.mp4"
    path.write_bytes(b"mine")
    (tmp_path / "video-2.mp4").symlink_to(tmp_path / "nothing")
    fake.answers["/view"] = b"new"
    assert one.download(ENTRY, path, overwrite=False) == tmp_path / "video-3.mp4"
    assert path.read_bytes() == b"mine" and (tmp_path / "video-3.mp4").read_bytes() == b"new"
    assert one.download(ENTRY, path) == path and path.read_bytes() == b"new"
    assert {file.name for file in tmp_path.iterdir()} == {"video.mp4", "video-2.mp4", "video-3.mp4"}


def test_a_file_that_appears_meanwhile_is_kept(fake, tmp_path):
    path = tmp_path / "video.mp4"

    def view(handler):
        path.write_bytes(b"theirs")
        return b"ours"
    fake.answers["/view"] = view
    assert client.Client(fake.url).download(ENTRY, path, overwrite=False).read_bytes() == b"ours"
    assert path.read_bytes() == b"theirs"


def test_what_is_viewed_is_read_back(fake):
    fake.answers["/view"] = b"bytes"
    with client.Client(fake.url).view(ENTRY) as answer:
        assert answer.read() == b"bytes"
    assert "filename=v.mp4" in fake.seen[-1][1]


@pytest.mark.parametrize("answer, words", [
    ((413, {}, b"no"), "too large"), ((500, {}, b"no"), "error 500"), ({}, "something else"), (b"<", "something else")])
def test_uploads_that_fail(fake, answer, words):
    fake.answers["/upload"] = answer
    with pytest.raises((client.JobError, client.StrangeServer), match=words):
        client.Client(fake.url).upload(b"data", "a\".png")
    fake.answers["/upload"] = {"name": "a.png", "subfolder": "s"}
    assert client.Client(fake.url).upload(b"data", "a\"\r\n.png") == "s/a.png"
    assert b'filename="a___.png"' in fake.seen[-1][3]


# ---- jobs ----

def done(handler):
    return {handler.path.rpartition("/")[2]: DONE}


def test_a_job_has_an_id_of_ours(fake):
    fake.answers |= {"/prompt": lambda handler: {"prompt_id": queued(fake)[-1], "node_errors": {}}, "/history": done}
    assert client.Client(fake.url).run(GRAPH) == DONE["outputs"]
    found, = queued(fake)
    assert len(found) == 36 and found == found.lower()


def test_a_lost_answer_does_not_queue_the_job_again(fake):
    fake.answers |= {"/prompt": None, "/history": done}
    fake.answers["/queue"] = lambda handler: {"queue_running": [[0, queued(fake)[0]]], "queue_pending": []}
    assert client.Client(fake.url).run(GRAPH) == DONE["outputs"] and len(queued(fake)) == 1


def test_a_job_that_did_not_arrive_is_sent_again_with_its_id(fake):
    answers = [None, {"prompt_id": "theirs", "node_errors": {}}]
    fake.answers |= {"/prompt": lambda handler: answers.pop(0),
                     "/history": lambda handler: {} if answers else done(handler)}
    answers.append(answers.pop())
    assert client.Client(fake.url).queue(GRAPH) == "theirs"
    assert len(queued(fake)) == 2 and len(set(queued(fake))) == 1


def test_a_proxy_whose_server_is_away_is_asked_again(fake, monkeypatch):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    answers = [(502, {}, b""), {}, {}]
    fake.answers |= {"/prompt": {"prompt_id": "x", "node_errors": {}}}
    fake.answers["/history"] = lambda handler: answers.pop(0) if len(answers) > 1 else {"x": DONE}
    assert client.Client(fake.url).run(GRAPH) == DONE["outputs"] and len(queued(fake)) == 1


def test_a_job_that_nobody_waits_for_is_cancelled(fake):
    fake.answers |= {"/prompt": {"prompt_id": "x", "node_errors": {}}, "/history": b"<html>"}
    with pytest.raises(client.StrangeServer):
        client.Client(fake.url).run(GRAPH)
    assert [json.loads(body) for body in asked(fake, "/interrupt")] == [{"prompt_id": "x"}]


def test_a_server_that_was_started_again_is_not_waited_for(fake, monkeypatch):
    monkeypatch.setattr(client, "LOOK_SECONDS", 0)
    fake.answers |= {"/prompt": {"prompt_id": "x", "node_errors": {}}, "/history": {}}
    with pytest.raises(client.JobError, match="does not know the job any more"):
        client.Client(fake.url).run(GRAPH)


@pytest.mark.parametrize("answers, words", [
    ({"/prompt": (400, {}, b"{no json")}, "something else"), ({"/prompt": {}}, "something else"),
    ({"/prompt": (500, {}, b"<html>")}, "error 500"), ({"/history": []}, "something else"),
    ({"/prompt": (400, {}, {"error": "in words"})}, "in words"),
    ({"/history": {"x": {"status": {"messages": [["execution_error", {}]]}}}}, "something else"),
    ({"/history": {"x": {}}}, "something else"), ({"/prompt": (307, {"Location": "/y"}, b"")}, "sends us to /y"),
])
def test_strange_answers_to_a_job(fake, answers, words):
    fake.answers |= {"/prompt": {"prompt_id": "x", "node_errors": {}}, "/history": {"x": DONE}, **answers}
    with pytest.raises((client.JobError, client.StrangeServer), match=words):
        client.Client(fake.url).run(GRAPH)


def test_a_servers_words_are_no_commands_to_the_terminal():
    text = errors.plain("\x1b[31mred\x1b]0;title\x07\r\n\u202eback\u00e9 \x9b")
    assert text == "red]0;title\nback\u00e9 "
    error = {"exception_type": "X", "exception_message": "\x1b[2Jcleared", "node_type": "N\x07", "node_id": "1"}
    with pytest.raises(client.JobError) as found:
        client.finished({"status": {"messages": [["execution_error", error]]}}, GRAPH)
    assert str(found.value) == "N (node 1) failed: cleared"


def test_what_a_node_says_is_heard_and_printed(fake, capsys):
    said = transport.text_of(b"\0\0\0\x03\0\0\0\x02" + "12no \u732b \x07".encode())
    assert said == {"type": transport.NODE_TEXT, "data": {"node": "12", "text": "no \u732b \x07"}}
    for other in (b"", b"\0\0\0\x03", b"\0\0\0\x01\0\0\0\x02picture"):
        assert transport.text_of(other) is None
    events = [said, {"type": "progress", "data": {"prompt_id": "other"}},
              {"type": "execution_success", "data": {"prompt_id": "x"}}]
    fake.answers |= {"/prompt": {"prompt_id": "x", "node_errors": {}}}
    fake.answers["/history"] = lambda handler: {} if events else {"x": DONE}
    one = client.Client(fake.url)
    one.events = lambda *_: SimpleNamespace(next=lambda seconds: events.pop(0) if events else None, close=lambda: None)
    assert one.run(GRAPH, heard=commands.note) == DONE["outputs"]
    assert capsys.readouterr().err == "no \u732b \n"


def test_results_that_are_none():
    assert client.results(DONE["outputs"], "1") == [ENTRY]
    for outputs in ({}, [], {"1": {}}, {"1": {"images": []}}, {"1": []}):
        with pytest.raises(client.JobError, match="without a result"):
            client.results(outputs, "1")


# ---- the runner's own server ----

@pytest.mark.skipif(os.name == "nt", reason="needs a Unix process group")
def test_the_guard_ends_a_server_whose_runner_was_killed(tmp_path):
    """A script in place of ComfyUI's main.py, once handling Ctrl-C and once ignoring it."""
    for ignores in (False, True):
        folder, script = tmp_path / "folder", tmp_path / "main.py"
        folder.mkdir()
        script.write_text("import sys, time\nprint(sys.argv[1:], __name__, flush=True)\n" + (
            "while True:\n    try:\n        time.sleep(9)\n    except KeyboardInterrupt:\n        pass\n" if ignores
            else "time.sleep(60)\n"))
        server = subprocess.Popen([sys.executable, str(launch.GUARD), str(folder), str(script), "--port", "1"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert server.stdout.readline() == b"['--port', '1'] __main__\n"
        server.stdin.close()  # as the OS does for a dead runner
        server.wait(15)
        assert not folder.exists()
