"""Run the tests in a real ComfyUI host, which is set up if need be.

    python tests/run.py                     everything but the tests marked slow
    python tests/run.py --all               everything
    python tests/run.py unit -k schedule    some of them; all other arguments go to pytest
    python tests/run.py --comfyui PATH      in an existing ComfyUI (nothing is installed into it)
    python tests/run.py --server URL        the tests over HTTP against a running ComfyUI that has the pack; what needs
                                            a server of its own is left out
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "workflows" / "runner"))

import host  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also run the tests marked slow")
    parser.add_argument("--comfyui", metavar="PATH", help="an existing ComfyUI folder to run in")
    parser.add_argument("--server", metavar="URL", help="a running ComfyUI for the tests over HTTP")
    options, rest = parser.parse_known_args()
    host.check_python()
    host.reexec(options.comfyui)
    missing = [name for name in ("pytest", "hypothesis") if not find_spec(name)]
    if missing:
        sys.exit(f"error: the tests need {' and '.join(missing)}, and nothing is installed into your ComfyUI unasked."
                 f" To install:\n  {sys.executable} -m pip install {' '.join(missing)}")
    import pytest

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only add overhead
    if options.server:
        os.environ["STILLMOTION_SERVER"] = options.server
    os.chdir(TESTS)
    return pytest.main([*([] if options.all else ["-m", "not slow"]), *(a.removeprefix("tests/") for a in rest)])


if __name__ == "__main__":
    sys.exit(main())
