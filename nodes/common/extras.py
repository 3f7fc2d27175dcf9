"""Optional packages, imported lazily, with a clear error message if they are missing."""
from importlib import import_module
from types import ModuleType


def import_extra(module: str, package: str, use: str) -> ModuleType:
    """Import `module` of optional `package`. The ImportError says what needs it (`use`) and how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{use} needs {package}, an optional extra of this pack ({error}). Install it into ComfyUI's "
                          f"Python: python -m pip install {package}") from error
