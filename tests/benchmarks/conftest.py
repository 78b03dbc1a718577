"""Loads the benchmark that a test file is about, as a module: `test_many_clips.py` is about `many_clips.py`."""

import importlib.util
import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark(request: pytest.FixtureRequest) -> ModuleType:
    """Give the benchmark as a module."""
    file = request.path.with_name(request.path.name.removeprefix("test_"))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its types may come back from other processes by pickle
    spec.loader.exec_module(module)
    return module
