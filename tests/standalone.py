"""Scripts and benchmarks are no package: a test that looks into one loads it by its path; no two names collide."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(path: str) -> ModuleType:
    """The file `path`, from the repository's root, as a module."""
    name = f"standalone_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module
