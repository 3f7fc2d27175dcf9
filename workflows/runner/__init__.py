"""Shared by the commands in the parent folder: a ComfyUI to run in, a client for its server, and graph editing.

Importing this package from a command makes its modules importable by their own names: `import host`. As a part of the
library it adds nothing to the import path.
"""

import sys
from pathlib import Path

if __name__ == "runner":
    sys.path.insert(1, str(Path(__file__).resolve().parent))
