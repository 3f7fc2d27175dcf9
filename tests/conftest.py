"""Every test finds ComfyUI and the pack importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import importable  # noqa: E402, F401
