"""Progress of a batch: on a terminal a line for each server and one for the whole, elsewhere a line for each event."""

import shutil
import sys
import threading
import time

REDRAW_SECONDS = 0.2
AWAY = {"away": "no answer", "unfit": "cannot be used", "gone": "ended"}


def duration(seconds):
    """45 s, 12 min, 3 h 5 min"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class BatchProgress:
    """counts(): {state: number of jobs}. Called from several threads."""

    def __init__(self, counts, stream=None):
        self.counts, self.stream = counts, stream or sys.stdout
        self.lock, self.servers, self.drawn, self.shown = threading.Lock(), {}, 0, 0
        self.start, self.made, self.away = None, 0, set()
        self.terminal = self.stream.isatty()

    def tell(self, event):
        with self.lock:
            if event.kind == "start":
                self.start = self.start or time.monotonic()
            self.made += event.kind == "saved"
            line = self._line(event)
            self.servers[event.server] = AWAY.get(event.kind, "idle") if event.kind != "start" else event.job.name
            if event.kind == "gone":
                self.servers.pop(event.server)
            if line:
                self._erase()
                print(line, file=self.stream, flush=True)
            self._draw()

    def progress(self, server, job, node, value, maximum):
        with self.lock:
            self.servers[server] = f"{job.name}  {node}: {value}/{maximum}"
            if self.terminal and time.monotonic() > self.shown + REDRAW_SECONDS:
                self._erase()
                self._draw()

    def close(self):
        with self.lock:
            self._erase()
            self.terminal = False

    def _line(self, event):
        """What happened, or None if it is not worth a line; a server that stays away is told once."""
        if event.kind == "away":
            news = event.server not in self.away
            self.away.add(event.server)
            return f"{event.server}: {event.text} Waiting for it." if news else None
        self.away.discard(event.server)
        if event.kind == "saved":
            files = "".join(f"saved {path}\n" for path in event.text.split("\n"))
            return f"{files}  {duration(event.seconds)} at {event.server}; {self.whole()}"
        if event.kind in ("failed", "again"):
            return f"error: {event.job.name}: {event.text}" + (" (is tried again)" if event.kind == "again" else "")
        if event.kind == "lost":
            return f"{event.server} was lost; {event.job.name} goes back to the list: {event.text}"
        return f"error: {event.text}" if event.kind == "unfit" else None

    def whole(self):
        """Numbers and, once a job is done, the time left at the speed so far."""
        counts = self.counts()
        left = counts["waiting"] + counts["running"]
        text = f"{counts['done']} of {sum(counts.values())} done"
        if counts["failed"]:
            text += f", {counts['failed']} failed"
        if left and self.made:
            text += f", about {duration(left * (time.monotonic() - self.start) / self.made)} left"
        return text

    def _erase(self):
        if self.terminal and self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")
        self.drawn = 0

    def _draw(self):
        if not self.terminal:
            return
        width = shutil.get_terminal_size().columns - 1
        lines = [f"  {server}: {doing}" for server, doing in sorted(self.servers.items())] + [f"  {self.whole()}"]
        print("\n".join(line[:width] for line in lines), file=self.stream, flush=True)
        self.drawn, self.shown = len(lines), time.monotonic()
