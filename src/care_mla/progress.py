"""One way to show progress: stages take a `Track`. `shown`, the default, draws bars where a person is looking; the command always does.

A bar is on stderr, fits 80 columns, and says what is done, how much of how much in which unit, how fast, and the time left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from care_mla.interrupts import heed_stop

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, Task

T = TypeVar("T")


def _one(item: Any) -> int:
    return 1


class Track(Protocol):
    """Wraps an iterable in a named progress bar.

    Args:
        total: of all items, in `unit`.
        unit: what is counted, in the plural: layers, windows, tokens.
        size: how much of it an item is.
    """

    def __call__(
        self,
        items: Iterable[T],
        description: str,
        total: int,
        *,
        unit: str = "steps",
        size: Callable[[T], int] = _one,
    ) -> Iterable[T]: ...


def silent(
    items: Iterable[T], description: str, total: int, *, unit: str = "steps", size: Callable[[T], int] = _one
) -> Iterable[T]:
    """No output."""
    return items


def shown(
    items: Iterable[T], description: str, total: int, *, unit: str = "steps", size: Callable[[T], int] = _one
) -> Iterable[T]:
    """A bar in a terminal or a notebook, nothing elsewhere: the default of the Python API."""
    return (rich_track if is_watched() else silent)(items, description, total, unit=unit, size=size)


def is_watched() -> bool:
    """Whether a person sees stderr as it is written."""
    return "ipykernel" in sys.modules or bool(sys.stderr and sys.stderr.isatty())


def rich_track(
    items: Iterable[T], description: str, total: int, *, unit: str = "steps", size: Callable[[T], int] = _one
) -> Iterator[T]:
    """A bar wherever stderr goes; in a file, its last line."""
    from rich.progress import BarColumn, TimeRemainingColumn

    with _bars(
        _text("{task.description}", width=28),
        BarColumn(bar_width=None),
        _text("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        _rate_column(),
        TimeRemainingColumn(elapsed_when_finished=True),
    ) as progress:
        task = progress.add_task(description, total=total)
        done = 0
        for item in items:
            heed_stop()
            yield item
            done = min(done + size(item), total)
            progress.update(task, completed=done)


class Meter(Protocol):
    """Shows how far a training run is, and some numbers of it."""

    def __call__(self, done: int, values: dict[str, float]) -> None: ...


MeterFactory = Callable[[int, str], AbstractContextManager[Meter]]
"""(total, unit) -> a meter for as long as the context lasts."""


def silent_meter(done: int, values: dict[str, float]) -> None:
    """No output."""


@contextmanager
def rich_meter(total: int, unit: str) -> Iterator[Meter]:
    """A bar with the numbers of a training run beside it; those that do not fit the line are cut."""
    from rich.progress import TimeRemainingColumn

    with _bars(
        _text("Healing", width=7),
        _text("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        _text("{task.fields[numbers]}", stretch=True),
        _rate_column(),
        TimeRemainingColumn(elapsed_when_finished=True),
    ) as progress:
        task = progress.add_task("Healing", total=total, numbers="")

        def show(done: int, values: dict[str, float]) -> None:
            heed_stop()
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            progress.update(task, completed=done, numbers=numbers)

        yield show


def _bars(*columns: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), expand=True)


def _text(form: str, *, width: int | None = None, stretch: bool = False) -> ProgressColumn:
    """A column of one line: all of it, the first `width` characters, or what room there is."""
    from rich.progress import TextColumn
    from rich.table import Column

    ratio = 1 if stretch else None
    return TextColumn(form, table_column=Column(no_wrap=True, overflow="ellipsis", width=width, ratio=ratio))


def _rate_column() -> ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        """How fast it goes."""

        def render(self, task: Task) -> Text:
            return Text(rate(task.finished_speed or task.speed))

    return Rate(table_column=Column(no_wrap=True))


def rate(per_second: float | None) -> str:
    """`1,234/s`, or the seconds that one takes where it takes more than one."""
    if not per_second:
        return ""
    return (
        f"{per_second:,.0f}/s"
        if per_second >= 10
        else f"{per_second:.1f}/s"
        if per_second >= 1
        else f"{1 / per_second:.1f} s each"
    )
