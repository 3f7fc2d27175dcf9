"""The list of a batch: one job for one content, nothing lost, nothing twice, judged by the files. No server."""
import os
import subprocess
import sys
import time
import tracemalloc
import uuid

import host
import joblist
import pytest

TEMPLATE = {"graph": {"1": {"class_type": "Save", "inputs": {}}}}


def rows(count=3, first=0):
    return [(f"clip{i}", [["1", "seed", i]]) for i in range(first, first + count)]


@pytest.fixture
def jobs(tmp_path):
    return joblist.JobList(tmp_path / "out", create=True)


def finish(jobs, job, data=b"video"):
    jobs.output.mkdir(exist_ok=True)
    path = jobs.output / f"{job.name}.mp4"
    path.write_bytes(data)
    jobs.done(job.id, [joblist.Made(path.name, joblist.sha256_of(path), len(data))], 1.0, 2)


def states(jobs):
    return {row["name"]: row["state"] for row in jobs.rows(*joblist.STATES)}


def test_the_same_content_is_the_same_job(jobs):
    picture = {"file": "/a/cat.png", "sha256": "ab"}
    assert jobs.submit(TEMPLATE, [("cat", [["1", "image", picture]]), *rows()]) == {"new": 4}
    moved = picture | {"file": "/b/moved.png"}
    assert jobs.submit(TEMPLATE, [("cat", [["1", "image", moved]]), *rows(4)]) == {"known": 4, "new": 1}
    changed = picture | {"sha256": "cd"}
    assert jobs.submit(TEMPLATE, [("cat", [["1", "image", changed]])]) == {"new": 1}
    other = {"graph": {"1": {"class_type": "Save", "inputs": {"crf": 1}}}}
    assert jobs.submit(other, rows(1)) == {"new": 1}
    assert jobs.counts()["waiting"] == 5  # the changed cat and the changed clip0 took the place of the former ones
    for row in jobs.rows("waiting"):
        assert str(uuid.UUID(row["id"])) == row["id"]


def test_ids_do_not_depend_on_the_machine_or_the_order(jobs, tmp_path):
    other = joblist.JobList(tmp_path / "other", create=True)
    jobs.submit(TEMPLATE, rows())
    other.submit(TEMPLATE, reversed(rows()))
    assert {row["id"] for row in jobs.rows("waiting")} == {row["id"] for row in other.rows("waiting")}


def test_rows_without_a_name_are_told_by_content_alone(jobs):
    nameless = [("", changes) for _, changes in rows()]
    assert jobs.submit(TEMPLATE, [*nameless, nameless[0]]) == {"new": 3, "same": 1}
    assert list(states(jobs)) == ["00001", "00002", "00003"]
    assert jobs.submit(TEMPLATE, [("", [["1", "seed", 9]]), *nameless]) == {"new": 1, "known": 3}


def test_a_name_that_is_taken_gets_a_number(jobs):
    jobs.submit(TEMPLATE, [("cat", [["1", "seed", i]]) for i in range(3)])
    assert list(states(jobs)) == ["cat", "cat-2", "cat-3"]


def test_each_job_goes_to_one_server(jobs):
    jobs.submit(TEMPLATE, rows(4))
    taken = [jobs.claim(server) for server in ("a", "b", "a", "b", "a")]
    assert [job and job.name for job in taken] == ["clip0", "clip1", "clip2", "clip3", None]
    assert len({job.prompt for job in taken[:4]}) == 4


def test_a_failed_job_is_tried_again_elsewhere_and_then_named(jobs):
    jobs.submit(TEMPLATE, rows(2))
    first = jobs.claim("a")
    assert jobs.failed(first, "no memory", retries=1) == "waiting"
    assert jobs.claim("a").name == "clip1"  # what has failed here comes last
    again = jobs.claim("b")
    assert again.id == first.id and again.prompt != first.prompt and again.attempts == 2
    assert jobs.failed(again, "no memory", retries=1) == "failed"
    row, = jobs.rows("failed")
    assert (row["error"], row["attempts"]) == ("no memory", 2)
    assert jobs.claim("b") is None and jobs.retry_failed() == 1 and jobs.claim("b").id == first.id


def test_submitting_again_lets_a_failed_job_wait(jobs):
    jobs.submit(TEMPLATE, rows(1))
    jobs.failed(jobs.claim("a"), "broken")
    jobs.submit(TEMPLATE, rows(1))
    assert states(jobs) == {"clip0": "waiting"}


def test_a_lost_servers_job_goes_to_the_next_one(jobs):
    jobs.submit(TEMPLATE, rows(1))
    first = jobs.claim("a", ["a", "b"])
    jobs.lost(first, "gone")
    other = jobs.claim("b", ["a", "b"])
    assert other.id == first.id and other.prompt != first.prompt and not other.again
    assert not jobs.belongs(first, "a") and jobs.belongs(other, "b")


def test_what_ends_every_server_is_not_tried_for_ever(jobs):
    jobs.submit(TEMPLATE, rows(1))
    for _ in range(joblist.LOSSES):
        jobs.lost(jobs.claim("a"), "gone")
    row, = jobs.rows("failed")
    assert "lost 5 times" in row["error"]


def test_a_job_with_blocks_waits_for_its_server(jobs, monkeypatch):
    jobs.submit(TEMPLATE | {"blocks": True}, rows(1))
    first = jobs.claim("a", ["a", "b"])
    jobs.lost(first, "gone")
    assert jobs.claim("b", ["a", "b"]) is None
    assert jobs.claim("a", ["a", "b"]).again
    jobs.lost(first, "gone")
    assert jobs.claim("b", ["b"]).id == first.id  # its server is no worker any more
    jobs.lost(first, "gone")
    monkeypatch.setattr(time, "time", lambda now=time.time(): now + joblist.HOLD_BLOCKS_SECONDS + 1)
    assert jobs.claim("c", ["a", "b", "c"]).id == first.id


def test_after_a_kill_the_files_decide(jobs, tmp_path):
    jobs.submit(TEMPLATE, rows(5))
    made, saved, half, missing, changed = [jobs.claim("a") for _ in range(5)]
    finish(jobs, made)
    finish(jobs, missing)
    finish(jobs, changed)
    for job in (saved, half):  # recorded, then killed: before or after the file got its name
        finish(jobs, job)
        jobs.db.execute("UPDATE jobs SET state = 'running', prompt = 'p' WHERE id = ?", (job.id,))
    (jobs.output / "clip2.mp4").unlink()
    (jobs.output / "clip3.mp4").unlink()
    (jobs.output / "clip4.mp4").write_bytes(b"vid30")
    later = joblist.JobList(tmp_path / "out")
    assert later.recover() == ["clip3", "clip4"]
    assert states(later) == {"clip0": "done", "clip1": "done", "clip2": "waiting", "clip3": "waiting",
                             "clip4": "waiting"}
    assert later.claim("b", ["a", "b"]).name == "clip3"  # clip2 may still run on a
    again = later.claim("a", ["a", "b"])
    assert (again.name, again.prompt, again.again) == ("clip2", "p", True)
    assert not later.renew(again).again and later.renew(again).prompt != "p"


def test_a_replaced_file_belongs_to_the_later_job(jobs):
    jobs.submit(TEMPLATE, rows(1))
    finish(jobs, jobs.claim("a"))
    jobs.submit(TEMPLATE, [("clip0", [["1", "seed", 77]])])
    finish(jobs, jobs.claim("a"), b"another")
    assert jobs.counts() == {"waiting": 0, "running": 0, "done": 1, "failed": 0} and jobs.recover() == []


def test_a_submission_that_breaks_off_adds_nothing(jobs):
    def broken():
        yield from rows(2)
        raise host.HostError("line 4 is wrong")

    with pytest.raises(host.HostError):
        jobs.submit(TEMPLATE, broken())
    assert sum(jobs.counts().values()) == 0


def test_ten_thousand_rows(jobs):
    """Listed in flat memory; to take a job, and a look from another process, cost a small part of listing them."""
    jobs.submit(TEMPLATE, rows(10))
    tracemalloc.start()
    start = time.monotonic()
    jobs.submit(TEMPLATE, ((f"clip{i}", [["1", "seed", i], ["1", "text", "x" * 200]]) for i in range(10_000)))
    listed, (_, peak) = time.monotonic() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert listed < 200 and peak < 2e6  # seconds, bytes
    start = time.monotonic()
    for _ in range(20):
        job = jobs.claim("a", ["a", "b"])
        jobs.intend(job.id, [])
        jobs.done(job.id, [joblist.Made(f"{job.name}.mp4", "0", 1)])
    assert (time.monotonic() - start) / 20 < listed / 2
    start = time.monotonic()
    assert joblist.JobList(jobs.folder).counts()["done"] == 20
    assert time.monotonic() - start < listed / 2


def test_status_needs_no_server_and_no_comfyui(jobs, tmp_path):
    jobs.submit(TEMPLATE, rows(3))
    jobs.claim("http://a")
    jobs.failed(jobs.claim("http://b"), "no \x1b[31mmemory")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STILLMOTION")}
    done = subprocess.run([sys.executable, "-S", host.WORKFLOWS / "run.py", "status", tmp_path / "out"],
                          capture_output=True, text=True, env=clean, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "1 waiting, 1 running, 0 done, 1 failed" in done.stdout
    assert "clip0 at http://a" in done.stdout and "clip1 failed after 1 tries: no memory" in done.stdout


def test_a_batch_that_is_not_there_is_named(tmp_path):
    with pytest.raises(host.HostError, match="there is no batch"):
        joblist.JobList(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
