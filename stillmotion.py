"""Lets `import stillmotion` work in a Python started in this folder, which is that package: the import system hands out
what stands in sys.modules when this file has run."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("stillmotion", FOLDER / "__init__.py",
                                               submodule_search_locations=[str(FOLDER)])
sys.modules["stillmotion"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["stillmotion"])
