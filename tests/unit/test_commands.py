"""Every command prints its help without starting a server or doing any work."""

import subprocess
import sys

import host
import pytest

TESTS = host.PACK / "tests"
COMMANDS = sorted(host.WORKFLOWS.glob("*.py")) + sorted(
    path for path in TESTS.glob("*.py") if "ArgumentParser" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help(path):
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {path.name}") and done.stderr == ""
