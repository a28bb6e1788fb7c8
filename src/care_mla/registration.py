"""`import care_mla` is light, and still makes converted models known to transformers: its Auto classes bring ours with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"


def with_transformers() -> None:
    """Register our classes now if transformers' Auto classes are imported, else as soon as they are."""
    when_imported(_register)


def when_imported(act: Callable[[], object]) -> None:
    """Do something now if transformers' Auto classes are imported, else as soon as they are."""
    if AUTO_CLASSES in sys.modules:
        act()
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    if act not in finder.waiting:
        finder.waiting.append(act)


def _register() -> None:
    import_module("care_mla.modeling")


class _Finder(MetaPathFinder):
    """Finds transformers' modules where Python would, and counts how many are being imported within each other.

    When the outermost is whole and the Auto classes are among what it brought, what waits is done: ours are registered. Earlier
    they could not be imported: they need parts of transformers that would be half there.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.waiting: list[Callable[[], object]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "transformers":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def done(self) -> None:
        """One import less is under way."""
        self.depth -= 1
        if self.depth == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            for act in self.waiting:
                act()


class _Loader(Loader):
    """Another loader that tells the finder when it begins and ends."""

    def __init__(self, loader: Loader, finder: _Finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.finder.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.done()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
