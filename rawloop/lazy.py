"""Packages whose names are imported when they are first used, so that their config.py needs no torch."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def importer(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose names stand in the modules that `home` says."""
    same = [name for name, module in home.items() if module == f"{package}.{name}"]
    assert not same, f"{same} are modules of {package} too: whoever imports one of them would get the module"

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(home[name]), name)

    return get
