"""Shared by the commands in the parent folder: a ComfyUI to run in, a client for its server, and graph editing.

Importing this package makes its modules importable by their own names: `import host`.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent))
