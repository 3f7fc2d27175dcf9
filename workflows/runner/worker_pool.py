"""Works off a list of jobs on several servers: one thread and one job at a time for each.

A lost server's job goes back to the list; results are written whole or not at all, and recorded before they get their
names, so that the end of this process at any moment neither loses a video nor makes one twice.
"""

import contextlib
import sqlite3
import threading
import time
from collections import namedtuple
from pathlib import Path

import host
from client import FreeName
from errors import JobError, JobLost, ServerGone
from inprocess import common
from jobgraphs import BadInput, short_name
from joblist import Made, sha256_of

IDLE_SECONDS = 0.2  # between looks at a list on which nothing waits
AWAY_SECONDS = 3  # between tries to reach a server
ALONE_SECONDS = 120  # without any server, until the command gives up; the list stays


class Stopped(BaseException):
    """The command is being stopped, or the server was taken off the list of workers."""


Event = namedtuple("Event", "kind server job text seconds", defaults=[None, "", None])


class WorkerPool:
    """Runs the jobs of a JobList on workers (see workers.py).

    tell(Event): called from the threads. kinds: open, away, unfit, gone (of a server), start, saved, again, failed,
    lost (of a job). text: what happened, of a saved job its files, one a line. progress(server, job, node, value,
    maximum) likewise.
    """

    def __init__(self, jobs, retries, overwrite, tell, progress):
        self.jobs, self.retries, self.overwrite, self.tell, self.progress = jobs, retries, overwrite, tell, progress
        self.threads = {}  # label: WorkerThread
        self.stopping, self.error = threading.Event(), None

    def join(self, worker):
        if worker.label not in self.threads:
            self.threads[worker.label] = WorkerThread(self, worker)
            self.threads[worker.label].start()

    def leave(self, label):
        """This server gets no more jobs; one that it works on goes back to the list."""
        self.threads.pop(label).leaving.set()

    def work(self, look=lambda: None):
        """Until every job is done or has failed. look(): called about every second, to add and remove workers.

        Raises HostError if no server is left, or the results cannot be saved. Anything that ends it early lets the
        jobs that run wait again.
        """
        reached = time.monotonic()
        try:
            while not self.error:
                look()
                threads = list(self.threads.values())
                if not self.left():
                    break
                if any(thread.open for thread in threads):
                    reached = time.monotonic()
                elif threads and all(thread.unfit for thread in threads):
                    raise host.HostError("\n".join(thread.unfit for thread in threads))
                elif time.monotonic() > reached + ALONE_SECONDS:
                    raise host.HostError(f"no server has answered for {ALONE_SECONDS} s; the list is kept.")
                time.sleep(IDLE_SECONDS)
        finally:
            self.stopping.set()
            for thread in list(self.threads.values()):
                thread.join()
        if self.error:
            raise self.error

    def left(self):
        counts = self.jobs.counts()
        return counts["waiting"] + counts["running"]


class WorkerThread(threading.Thread):
    def __init__(self, pool, worker):
        super().__init__(name=worker.label, daemon=True)
        self.pool, self.jobs, self.worker, self.leaving = pool, pool.jobs, worker, threading.Event()
        self.open, self.unfit, self.stray = False, None, None

    def run(self):
        try:
            while not self._ending():
                if not self.open and not self._reach():
                    if self.unfit:
                        break
                    self._pause(AWAY_SECONDS)
                    continue
                job = self.jobs.claim(self.worker.label, list(self.pool.threads))
                if job is None:
                    self._pause(IDLE_SECONDS)
                else:
                    self._do(job)
        except sqlite3.Error as error:
            self.pool.error = host.HostError(f"the list in {self.jobs.folder} cannot be written: {error}. Free some "
                                             "space and resume the batch.")
        except Exception as error:  # raised in the main thread
            self.pool.error = self.pool.error or error
        finally:
            self.open = False
            self.worker.close()
            self.tell("gone")

    def tell(self, kind, job=None, text="", seconds=None):
        self.pool.tell(Event(kind, self.worker.label, job, text, seconds))

    def _ending(self):
        return self.pool.stopping.is_set() or self.leaving.is_set() or self.pool.error

    def _pause(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._ending():
            time.sleep(0.05)

    def _reach(self):
        try:
            self.worker.open()
            if self.stray:  # it may still work on what was given to another server meanwhile
                job, self.stray = self.stray, None
                if not self.jobs.belongs(job, self.worker.label):
                    self.worker.cancel(job.prompt)
        except ServerGone as error:
            self.tell("away", text=str(error))
        except host.HostError as error:
            self.unfit = str(error)
            self.tell("unfit", text=self.unfit)
        else:
            self.open = True
            self.tell("open")
        return self.open

    def _do(self, job):
        self.tell("start", job)
        try:
            try:
                made = self._run(job)
            except JobLost:
                if not job.again:
                    raise
                job = self.jobs.renew(job)  # the server was started again since
                made = self._run(job)
            self.tell("saved", job, "\n".join(keep(self.jobs, job, made, self.pool.overwrite)), made.seconds)
        except Stopped:
            self.jobs.release(job)
        except (ServerGone, JobLost) as error:
            self.open, self.stray = False, job
            self.worker.lost()
            self.jobs.lost(job, str(error))
            self.tell("lost", job, str(error))
        except host.HostError as error:  # the server cannot run this batch
            self.jobs.release(job)
            self.open, self.unfit = False, str(error)
            self.leaving.set()
            self.tell("unfit", job, self.unfit)
        except JobError as error:
            state = self.jobs.failed(job, str(error), 0 if isinstance(error, BadInput) else self.pool.retries)
            self.tell("failed" if state == "failed" else "again", job, str(error))
        except OSError as error:  # no result can be saved any more
            self.jobs.release(job)
            self.pool.error = host.HostError(f"cannot save {job.name}: {error}. Free some space and resume the batch.")

    def _run(self, job):
        return self.worker.run(job, lambda *step: self.pool.progress(self.worker.label, job, *step), self._watch)

    def _watch(self):
        if self._ending():
            raise Stopped


def keep(jobs, job, made, overwrite=False):
    """Save the results of a job atomically and record them; returns their paths. Raises OSError, ServerGone.

    NAME.mp4, or NAME_0.mp4, NAME_1.mp4, ... of several. A file that is there already stays, and the new one gets a
    number, unless `overwrite` is set or it is this job's own.
    """
    saving, before, found = common("saving"), dict(enumerate(jobs.files(job.id))), []
    with contextlib.ExitStack() as names:
        for i, entry in enumerate(made.entries):
            number = f"_{i}" if len(made.entries) > 1 else ""
            name = FreeName(jobs.output / f"{job.name}{number}{short_name(Path(str(entry.get('filename'))).suffix)}")
            if i in before and jobs.intact(before[i]):
                name = FreeName(jobs.output / before[i].path)
                target = saving.replacing(name.path)
            elif overwrite:
                target = saving.replacing(name.path)
            else:
                while name.path.exists():
                    name.number += 1
                target = saving.new_file(name)
            content = names.enter_context(target)
            with open(content, "xb") as file:
                made.fetch(entry, file)
            found.append((name, sha256_of(content), content.stat().st_size))
        jobs.intend(job.id, files_of(jobs, found))
    files = files_of(jobs, found)
    jobs.done(job.id, files, made.seconds, made.memory)
    return [str((jobs.output / file.path).resolve()) for file in files]


def files_of(jobs, found):
    return [Made(name.path.relative_to(jobs.output), sha256, size) for name, sha256, size in found]
