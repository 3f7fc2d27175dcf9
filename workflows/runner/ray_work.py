"""What an actor does: it owns a ComfyUI and runs one job at a time on it (see ray_workers.py)."""

from types import SimpleNamespace

import host
import workers
from errors import JobError, JobLost, ServerGone
from jobgraphs import BadInput
from joblist import Job


class Work:
    """Errors are returned, as {"kind", "text"}: exceptions would need the same classes at both ends."""

    def __init__(self, options, folder=None):
        self.options, self.folder, self.own, self.state, self.known = SimpleNamespace(**options), folder, None, None, {}

    def open(self):
        """Start ComfyUI unless it runs; returns what prevents it, or None."""
        try:
            self.own = self.own or workers.PrivateWorker(self.options, self.known.get, folder=self.folder)
            self.own.open()
        except (host.HostError, ServerGone) as error:
            return str(error)

    def run(self, template, job, inputs):
        """The files of a job as [(name, bytes)], its seconds and memory. inputs: {sha256: (bytes, name)}."""
        job = Job(*job)
        self.known[job.template], self.state = template, None
        if not (self.own and self.own.bench):
            problem = self.open()
            if problem:
                return {"kind": "host", "text": problem}
        try:
            made = self.own.run(job, self._progress, lambda: None, lambda value: inputs[value["sha256"]])
            files = []
            for entry in made.entries:
                with self.own.bench.client.view(entry) as file:
                    files.append((entry["filename"], file.read()))
            return {"files": files, "seconds": made.seconds, "memory": made.memory}
        except BadInput as error:
            return {"kind": "input", "text": str(error)}
        except JobLost as error:
            return {"kind": "unknown", "text": str(error)}
        except JobError as error:
            return {"kind": "failed", "text": str(error)}
        except ServerGone as error:
            self.own.lost()
            return {"kind": "lost", "text": str(error)}
        except host.HostError as error:
            return {"kind": "host", "text": str(error)}

    def _progress(self, *step):
        self.state = step
