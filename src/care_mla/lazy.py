"""Packages whose names are imported when they are first used: `import care_mla` and `care --help` load no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


def on_first_use(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """Let a package have names of its modules without importing them before they are asked for.

    A module that bears the name of what it holds, as `pipeline.convert` does, does not take the name's place when it is imported.

    Args:
        package: its name; called while it is imported.
        homes: module -> names that come from it; together they are the package's `__all__`.
    """
    home = {name: module for module, names in homes.items() for name in names}

    class Package(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in home:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(import_module(home[name]), name)
            super().__setattr__(name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if name in home and isinstance(
                value, ModuleType
            ):  # the import system, which tells a package of its modules
                return
            super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *home})

    module = sys.modules[package]
    module.__class__ = Package
    module.__dict__["__all__"] = sorted(home)
