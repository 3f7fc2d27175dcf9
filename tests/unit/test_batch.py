"""Batches without a server: graphs and tables, addresses and passwords, saving, progress, options."""
import io
import json
from types import SimpleNamespace

import batch
import batch_progress
import client
import host
import jobgraphs
import joblist
import pytest
import worker_pool
import workers
from fake_comfyui import asked

GRAPH = {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
         "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["9", 0], "text": "x"}, "_meta": {"title": "Prompt"}},
         "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["9", 0], "text": ""}},
         "4": {"class_type": "Sampler", "inputs": {"seed": 1, "cfg": 7.5, "tiled": False, "resume_folder": "",
                                                   "format": "mp4"}}}


# ---- graphs ----

@pytest.mark.parametrize("address, found", [("4.seed", ("4", "seed")), ("Sampler.cfg", ("4", "cfg")),
                                            ("Prompt.text", ("2", "text")), ("4.format.codec", ("4", "format.codec"))])
def test_inputs_are_found_by_id_title_or_class(address, found):
    assert jobgraphs.find_input(GRAPH, address) == found


@pytest.mark.parametrize("address, words", [("CLIPTextEncode.text", "2 nodes are called"), ("5.seed", "names no input"),
                                            ("seed", "names no input"), ("2.clip", "wired to another node")])
def test_inputs_that_cannot_be_set(address, words):
    with pytest.raises(host.HostError, match=words):
        jobgraphs.find_input(GRAPH, address)


def test_values_get_the_type_of_the_graph(tmp_path):
    job = json.loads(json.dumps(GRAPH))
    assert jobgraphs.settings(job, ["4.seed=12", "4.cfg=2", "4.tiled=true", "2.text=1=2", "4.new=[1]"]) == []
    assert job["4"]["inputs"] == GRAPH["4"]["inputs"] | {"seed": 12, "cfg": 2.0, "tiled": True, "new": [1]}
    assert job["2"]["inputs"]["text"] == "1=2"
    for pair, words in (("4.seed=x", "must be a whole number"), ("4.tiled=maybe", "true or false"), ("4", "=VALUE")):
        with pytest.raises(host.HostError, match=words):
            jobgraphs.settings(job, [pair])


def test_a_table_gives_a_job_for_each_row(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"cat")
    path = tmp_path / "table.csv"
    path.write_text('\ufeffname,1.image,Prompt.text,4.seed\na/b,cat.png,"one, two",5\n,there.png,,6\n', "utf-8")
    first, second = jobgraphs.table_rows(GRAPH, path)
    file = {"file": str(tmp_path / "cat.png"), "sha256": joblist.sha256_of(tmp_path / "cat.png")}
    assert first == ("a_b", [["1", "image", file], ["2", "text", "one, two"], ["4", "seed", 5]])
    assert second == ("", [["1", "image", "there.png"], ["4", "seed", 6]])  # a file of the server; the graph's text


@pytest.mark.parametrize("text, words", [("4.seed\nx\n", "line 2: 4.seed is 'x'"), ("4.seed,4.cfg\n1\n", "line 2"),
                                         ("4.nothing.at,5.x\n", "names no input"), ("", "no columns"),
                                         ("name\na\n", "no columns"), ('4.seed\n"1\n', "cannot be read as a table")])
def test_tables_that_are_wrong_are_named(text, words, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(host.HostError, match=words):
        list(jobgraphs.table_rows(GRAPH, tmp_path / "table.csv"))


def test_the_blocks_of_two_jobs_do_not_meet():
    graph = json.loads(json.dumps(GRAPH))
    assert not jobgraphs.has_blocks(graph)
    graph["4"]["inputs"]["resume_folder"] = "long"
    assert jobgraphs.has_blocks(graph)
    job = SimpleNamespace(id="0123456789abcdef", changes=[["2", "text", "y"]])
    made, _ = jobgraphs.build({"graph": graph}, job, {}, None)
    assert made["4"]["inputs"]["resume_folder"] == "long/0123456789abc" and made["2"]["inputs"]["text"] == "y"
    assert graph["2"]["inputs"]["text"] == "x"


def test_an_input_that_was_changed_is_not_used(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    value = jobgraphs.Changes({}).file(tmp_path / "clip.mp4")
    assert jobgraphs.read_input(value) == (b"clip", f"{value['sha256'][:24]}.mp4")
    (tmp_path / "clip.mp4").write_bytes(b"other")
    with pytest.raises(jobgraphs.BadInput, match="changed after the list was made"):
        jobgraphs.read_input(value)


@pytest.mark.parametrize("text, words", [('{"nodes": []}', "workflow of ComfyUI's page"), ("[]", "no API graph"),
                                         ("{", "cannot be read")])
def test_files_that_are_no_graph(text, words, tmp_path):
    (tmp_path / "graph.json").write_text(text)
    with pytest.raises(host.HostError, match=words):
        jobgraphs.read_graph(tmp_path / "graph.json")


# ---- addresses ----

def test_addresses_with_passwords_from_the_environment(tmp_path):
    path = tmp_path / "workers.txt"
    path.write_text("# mine\nhttp://a:8188 token=$TOKEN_A\n\nhttp://me:$PASSWORD@b # slow\nhttp://c\n")
    environment = {"TOKEN_A": "one", "PASSWORD": "p@ss", "STILLMOTION_TOKEN": "all"}
    assert workers.read_addresses(str(path), environment) == [
        ("http://a:8188", "one"), ("http://me:p%40ss@b", None), ("http://c", "all")]
    assert workers.read_addresses("http://a,http://b", {}) == [("http://a", None), ("http://b", None)]


@pytest.mark.parametrize("line, words", [("http://a token=$NONE", "line 1: the variable NONE is not set"),
                                         ("http://a:se$", r"line 1: write \$ as \$\$"),
                                         ("http://a secret", "only token=TOKEN")])
def test_addresses_that_are_wrong(line, words, tmp_path):
    (tmp_path / "workers").write_text(line)
    with pytest.raises(host.HostError, match=words) as error:
        workers.read_addresses(str(tmp_path / "workers"), {})
    assert line.split()[-1] not in str(error.value)


def test_a_token_is_sent_and_never_shown(fake):
    worker = workers.RemoteWorker(workers.Address(fake.url, "s3cret"), None)
    fake.answers["/object_info"] = {}
    worker.open()
    sent = {headers["Authorization"] for kind, path, headers, body in fake.seen}
    assert sent == {"Bearer s3cret"} and "s3cret" not in worker.label
    fake.answers["/object_info"] = (401, {}, b"")
    with pytest.raises(client.ServerGone) as error:
        worker.open()
    assert "s3cret" not in str(error.value)


def test_the_options_that_are_kept_hold_no_password(tmp_path):
    jobs = joblist.JobList(tmp_path / "out", create=True)
    options = dict.fromkeys([*batch.PLACE, "checkpoint", "preset", "retries", "overwrite"])
    options |= {"workers": "http://me:pw@a,https://b:pw@c:1,me:pw@d", "retries": 0}
    batch.remember(SimpleNamespace(**options), jobs)
    assert jobs.setting("options") == {"workers": "http://a,https://c:1,d", "retries": 0}


class WorkerPool:
    def __init__(self):
        self.threads = []

    def join(self, worker):
        self.threads.append(worker.label)

    def leave(self, label):
        self.threads.remove(label)


def test_servers_come_and_go_with_the_file(tmp_path, capsys):
    path, pool = tmp_path / "workers.txt", WorkerPool()
    path.write_text("http://a\nhttp://b\n")
    listed = workers.WorkerList(str(path), lambda address: SimpleNamespace(label=address.url, address=address), pool)

    def write(text):
        path.write_text(text)
        listed.stamp = None  # file times are coarse
        listed.look()
        return pool.threads

    assert pool.threads == ["http://a", "http://b"]
    assert write("http://b\nhttp://c\n") == ["http://b", "http://c"]
    assert write("http://b token=1\nhttp://c\n") == ["http://c", "http://b"]
    assert write("http://b $X\n") == ["http://c", "http://b"] and "stay as they were" in capsys.readouterr().err
    assert write("") == []


def test_newer_servers_are_asked_for_the_job_itself(fake):
    """/api/jobs, which ComfyUI has since 0.6."""
    done = {"status": "completed", "outputs": {"1": {}}, "execution_status": {"messages": []}}
    answers = [(404, {}, b'{"error": "Job not found"}'), {"status": "in_progress"}, {"status": "pending"}, done]
    fake.answers |= {"/api/jobs/": lambda handler: answers.pop(0), "/api/jobs": {"jobs": []}}  # and no history
    one = client.Client(fake.url)
    prompt = joblist.content_id("x")
    assert one._look(prompt) == (False, None)
    assert one.run({}, prompt_id=prompt, again=True) == {"1": {}}
    assert asked(fake, "/prompt") == []
    answers[:] = [(404, {}, b"{}")] * 2
    with pytest.raises(client.JobLost, match="does not know the job"):
        one.run({}, prompt_id=prompt, again=True)


# ---- saving ----

def made_of(*contents):
    return workers.Made([{"filename": "x.mp4", "data": data} for data in contents],
                      lambda entry, file: file.write(entry["data"]), 1.0, 5)


def test_results_are_recorded_before_they_get_their_names(tmp_path, monkeypatch):
    jobs = joblist.JobList(tmp_path / "out", create=True)
    jobs.submit({"graph": {}}, [("clip", []), ("other", [])])
    jobs.output.mkdir()
    (jobs.output / "clip_1.mp4").write_text("somebody's")
    job = jobs.claim("a")
    seen = []
    monkeypatch.setattr(jobs, "intend", lambda *given: seen.append((given, sorted(jobs.output.glob("*.mp4")))))
    worker_pool.keep(jobs, job, made_of(b"one", b"two"))
    (name, files), there = seen[0]
    assert [str(file.path) for file in files] == ["clip_0.mp4", "clip_1-2.mp4"] and len(there) == 1
    assert (jobs.output / "clip_1.mp4").read_text() == "somebody's"
    assert (jobs.output / "clip_1-2.mp4").read_bytes() == b"two"
    worker_pool.keep(jobs, job, made_of(b"one", b"two"))  # its own files are replaced
    assert len(list(jobs.output.iterdir())) == 3
    worker_pool.keep(jobs, jobs.claim("a"), made_of(b"x"), overwrite=True)
    assert (jobs.output / "other.mp4").read_bytes() == b"x"


def test_a_result_that_breaks_off_leaves_nothing(tmp_path):
    jobs = joblist.JobList(tmp_path / "out", create=True)
    jobs.submit({"graph": {}}, [("clip", [])])
    jobs.output.mkdir()
    made = made_of(b"one", b"two")

    def broken(entry, file):
        file.write(b"half")
        if entry["data"] == b"two":
            raise client.ServerGone("away")

    job = jobs.claim("a")
    with pytest.raises(client.ServerGone):
        worker_pool.keep(jobs, job, made._replace(fetch=broken))
    assert list(jobs.output.iterdir()) == [] and jobs.files(job.id) == []


# ---- progress and options ----

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_of_every_server_and_the_whole():
    counts = {"waiting": 3, "running": 1, "done": 0, "failed": 0}
    job = SimpleNamespace(name="cat")
    for stream in (Terminal(), io.StringIO()):
        screen = batch_progress.BatchProgress(lambda: counts, stream)
        screen.tell(worker_pool.Event("open", "http://a"))
        screen.tell(worker_pool.Event("start", "http://a", job))
        screen.progress("http://a", job, "Sampler", 3, 4)
        counts |= {"done": 1, "waiting": 2}
        screen.tell(worker_pool.Event("saved", "http://a", job, "cat.mp4", 100.0))
        screen.tell(worker_pool.Event("away", "http://b", None, "No answer."))
        screen.tell(worker_pool.Event("away", "http://b", None, "No answer."))
        text = stream.getvalue()
        assert "saved cat.mp4\n  2 min at http://a; 1 of 4 done, about 0 s left" in text
        assert text.count("No answer.") == 1
        assert ("http://b: no answer" in text) == ("\x1b[" in text) == stream.isatty()
    assert [batch_progress.duration(seconds) for seconds in (5, 600, 11_000)] == ["5 s", "10 min", "3 h 3 min"]


@pytest.mark.parametrize("arguments, words", [
    (["--workers", "a", "--server", "b"], "give one of them"), (["--retries", "-1"], "--retries is -1"),
    (["--workers", "http://a", "--device", "cpu"], "leave out --device"), (["--over", "nothing"], "no file or folder"),
    (["--ray", "--ray_workers", "0"], "--ray_workers is 0")])
def test_bad_options_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        batch.main(["graph.json", *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err
