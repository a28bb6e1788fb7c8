"""One way to show progress: stages take a `Track`; the library default is silent, the CLI passes `rich_track`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from care_mla.interrupts import heed_stop

T = TypeVar("T")


class Track(Protocol):
    """Wraps an iterable of known length in a named progress bar."""

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """No output: the default of the Python API."""
    return items


def rich_track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """A rich progress bar with the time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        for item in progress.track(items, total=total, description=description):
            heed_stop()
            yield item


class Meter(Protocol):
    """Shows how far a training run is, and some numbers of it."""

    def __call__(self, done: int, values: dict[str, float]) -> None: ...


def silent_meter(done: int, values: dict[str, float]) -> None:
    """No output: the default of the Python API."""


@contextmanager
def rich_meter(total: int, unit: str) -> Iterator[Meter]:
    """A rich bar with the numbers beside it and the time left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("Healing"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("Healing", total=total, numbers="")

        def show(done: int, values: dict[str, float]) -> None:
            heed_stop()
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            progress.update(task, completed=done, numbers=numbers)

        yield show
