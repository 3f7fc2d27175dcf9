"""Runs ComfyUI's main.py and terminates it when the parent process dies, which shows as EOF on standard input.

    python guard.py FOLDER main.py ...      FOLDER, the server's own, is then removed
"""

import _thread
import os
import runpy
import shutil
import signal
import sys
import threading

SECONDS = 3  # for ComfyUI to shut down cleanly


def watch(folder, orphaned):
    while os.read(0, 1024):
        pass
    orphaned.set()
    _thread.interrupt_main()
    threading.Event().wait(SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main():
    folder, script = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(script)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the runner was started in the background
    orphaned = threading.Event()
    threading.Thread(target=watch, args=(folder, orphaned), daemon=True).start()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if orphaned.is_set():
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
