"""A pool of servers without a server: lost ones, unfit ones, those that leave, and results that cannot be saved."""
import threading
import time

import errors
import host
import joblist
import pytest
import worker_pool
import workers


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(worker_pool, "AWAY_SECONDS", 0.02)
    monkeypatch.setattr(worker_pool, "IDLE_SECONDS", 0.02)


@pytest.fixture
def jobs(tmp_path):
    made = joblist.JobList(tmp_path / "out", create=True)
    made.submit({"graph": {"1": {"class_type": "Save", "inputs": {}}}}, [(f"clip{i}", []) for i in range(4)])
    made.output.mkdir()
    return made


class FakeWorker:
    """Runs jobs at once, but raises what `faults` hold first."""

    def __init__(self, label, faults=(), opening=()):
        self.label, self.faults, self.opening, self.ran, self.cancelled = label, list(faults), list(opening), [], []

    def open(self):
        if self.opening and (fault := self.opening.pop(0)):
            raise fault

    def run(self, job, progress, watch):
        self.ran.append(job)
        progress("Sampler", 1, 2)
        watch()
        if self.faults and (fault := self.faults.pop(0)):
            raise fault
        time.sleep(0.01)
        return workers.Made([{"filename": "x.mp4"}], lambda entry, file: file.write(job.name.encode()), 0.1, 5)

    def cancel(self, prompt):
        self.cancelled.append(prompt)

    def lost(self):
        pass

    close = lost


def work(jobs, *given, retries=0, look=lambda: None):
    told = []
    pool = worker_pool.WorkerPool(jobs, retries, False, told.append, lambda *step: None)
    for worker in given:
        pool.join(worker)
    try:
        pool.work(look)
    finally:
        assert not [thread for thread in pool.threads.values() if thread.is_alive()]
    return [(event.kind, event.server) for event in told]


def check(jobs):
    assert jobs.counts()["done"] == 4
    assert {path.name: path.read_text() for path in jobs.output.iterdir()} == {f"clip{i}.mp4": f"clip{i}"
                                                                               for i in range(4)}


def test_a_lost_server_gives_its_job_back_and_is_used_again(jobs):
    one, two = FakeWorker("a", [errors.ServerGone("gone")], [None, errors.ServerGone("not yet")]), FakeWorker("b")
    told = work(jobs, one, two)
    check(jobs)
    assert ("lost", "a") in told and ("away", "a") in told
    assert len(one.ran) + len(two.ran) == 5


def test_a_job_that_went_to_another_server_is_cancelled_at_the_first(jobs):
    taken = threading.Event()

    class Back(FakeWorker):
        def open(self):
            assert not self.ran or taken.wait(5)

    class Taking(FakeWorker):
        def run(self, job, progress, watch):
            taken.set()
            return super().run(job, progress, watch)

    jobs.db.execute("DELETE FROM jobs WHERE number > 1")
    one, two = Back("a", [errors.ServerGone("gone")]), Taking("b", opening=[errors.ServerGone("later")] * 3)
    work(jobs, one, two)
    assert one.cancelled == [one.ran[0].prompt] and jobs.counts()["done"] == 1


def test_a_job_that_its_server_forgot_gets_a_new_id(jobs):
    jobs.claim("a")
    jobs.recover()
    worker = FakeWorker("a", [errors.JobLost("unknown")])
    work(jobs, worker)
    check(jobs)
    first, second = worker.ran[:2]
    assert first.again and not second.again and first.id == second.id and first.prompt != second.prompt


def test_a_failure_is_kept_and_does_not_stop_the_others(jobs):
    told = work(jobs, FakeWorker("a", [errors.JobError("no memory")] * 2), retries=1)
    assert [kind for kind, _ in told if kind in ("again", "failed")] == ["again", "again"]
    check(jobs)
    jobs.submit({"graph": {}}, [("bad", [])])
    work(jobs, FakeWorker("a", [errors.JobError("no memory")]))
    assert [row["error"] for row in jobs.rows("failed")] == ["no memory"]


def test_servers_that_cannot_run_the_graph_are_named(jobs, fake):
    fake.answers["/object_info"] = {"Other": {}}
    told = []
    pool = worker_pool.WorkerPool(jobs, 0, False, told.append, None)
    pool.join(workers.RemoteWorker(workers.Address(fake.url), jobs.template))
    with pytest.raises(host.HostError, match="lacks the nodes Save: install"):
        pool.work()
    assert jobs.counts()["waiting"] == 4


def test_the_list_is_kept_if_no_server_answers(jobs, monkeypatch):
    monkeypatch.setattr(worker_pool, "ALONE_SECONDS", 0.1)
    with pytest.raises(host.HostError, match="no server has answered for 0.1 s"):
        work(jobs, FakeWorker("a", opening=[errors.ServerGone("away")] * 99))
    assert jobs.counts()["waiting"] == 4


def test_a_full_disk_ends_the_batch_and_loses_nothing(jobs):
    worker = FakeWorker("a")
    jobs.output.rmdir()
    jobs.output.write_text("in the way")
    with pytest.raises(host.HostError, match="cannot save clip0"):
        work(jobs, worker)
    assert jobs.counts()["waiting"] == 4
    jobs.output.unlink()
    work(jobs, worker)
    check(jobs)


def test_stopping_lets_the_jobs_wait_again(jobs):
    class Endless(FakeWorker):
        def run(self, job, progress, watch):
            while True:
                watch()
                time.sleep(0.01)

    def stop():
        if jobs.counts()["running"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(jobs, Endless("a"), Endless("b"), look=stop)
    assert jobs.counts()["waiting"] == 4
    assert [row["prompt"] for row in jobs.rows("waiting")] == [None] * 4


def test_a_server_that_leaves_gives_its_job_to_another(jobs):
    class Stuck(FakeWorker):
        def run(self, job, progress, watch):
            while True:
                watch()
                time.sleep(0.01)

    pool = worker_pool.WorkerPool(jobs, 0, False, lambda event: None, lambda *step: None)
    pool.join(Stuck("a"))

    def look():
        if jobs.counts()["running"] and "a" in pool.threads:
            pool.leave("a")
            pool.join(FakeWorker("b"))

    pool.work(look)
    check(jobs)
