"""What the commands beside this folder share: a ComfyUI to run in, a client of its server, and graphs to send it.

Importing this package puts its modules within reach by their own names: `import host`.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent))
