"""Directories that care writes: marked as its own, locked while they are made, appearing whole or not at all.

The rule of `--overwrite`: only a directory with care's mark, of the kind that is being written and with nothing else in it, is
replaced; never one that holds, is or lies inside an input. One file, since marks, locks and moving aside keep this rule together.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from secrets import token_hex

from filelock import FileLock, Timeout

from care_mla.errors import CheckpointError, ConfigError
from care_mla.files import beside, sync, vanishing, write_json, writing
from care_mla.interrupts import uninterrupted

MARK = "care_files.json"
FORMAT = "care-mla files 1"
LATER = ("care_eval.json", "care_report.html", ".*.partial", ".DS_Store")
"""What may come into an output after it was written: evaluations, reports, what a killed process left of them, and a Mac's notes."""

_log = logging.getLogger("care_mla")


class Kind(StrEnum):
    """What an output directory holds."""

    STATISTICS = "statistics"
    CONVERTED = "converted model"
    HEALED = "healed model"
    EXPORTED = "exported model"
    FETCHED = "fetched model"
    HEALING = "unfinished healing"
    SCRATCH = "scratch"


Inputs = Iterable[tuple[str, Path]]
"""What a command reads, and what it calls it: ("the source", PATH)."""


# --- marks ------------------------------------------------------------------------------------------------------------


def mark(directory: Path, kind: Kind, files: Sequence[str] = ()) -> None:
    """Say that a directory is care's, and which files in it are (names below it, or patterns)."""
    write_json(directory / MARK, {"format": FORMAT, "kind": kind.value, "files": sorted(files)})


def _marked(directory: Path) -> dict[str, object] | None:
    """The mark of a directory of care's own."""
    try:
        found = json.loads((directory / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _files_below(directory: Path) -> Iterator[str]:
    """Names below a directory of everything that is not a directory, and of directories with nothing in them."""
    for path in directory.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            yield path.relative_to(directory).as_posix()


def _foreign(directory: Path, kind: Kind) -> str | None:
    """Why a directory is not care's own of this kind with nothing else in it; None where it is."""
    found = _marked(directory)
    if found is None:
        return f"it has no {MARK} of care's"
    if found.get("kind") != kind.value:
        return f"it is {_with_article(str(found.get('kind')))}"
    files = found.get("files")
    own = [MARK, *LATER, *map(str, files if isinstance(files, list) else [])]
    for name in _files_below(directory):
        if not any(fnmatchcase(name, pattern) or name == pattern for pattern in own):
            return f"it holds {name}, which care did not write"
    return None


def _with_article(kind: str) -> str:
    article = "" if kind == Kind.STATISTICS else "an " if kind[:1] in "aeiou" else "a "
    return f"{article}{kind}"


def remove(directory: Path) -> None:
    """Remove a directory of care's own; its mark goes last, so that what a kill leaves of it is known again."""
    for path in directory.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    shutil.rmtree(directory)


# --- what may be written ----------------------------------------------------------------------------------------------


def require_replaceable(out: Path, kind: Kind, overwrite: bool, *, option: str = "--out") -> None:
    """Refuse a target that is not care's own, one that is without `overwrite`, and one that cannot be written.

    Raises:
        CheckpointError
    """
    try:
        exists, whole = os.path.lexists(out), _resolved(out)
        if exists and not whole.is_dir():
            raise CheckpointError(f"{option} {out} exists and is not a directory")
        if exists and os.path.ismount(whole):
            raise CheckpointError(f"{option} {out} is a mount point; choose a directory inside it")
        if exists and any(whole.iterdir()):
            why = _foreign(whole, kind)
            if why is not None:
                raise CheckpointError(
                    f"{option} {out} exists and is not {_with_article(kind)} that care wrote ({why}); choose another {option}"
                )
            if not overwrite:
                raise CheckpointError(f"{option} {out} exists; choose another {option} or pass --overwrite")
        parent = next(path for path in whole.parents if os.path.lexists(path))
        if not parent.is_dir():
            raise CheckpointError(f"{option} {out}: {parent} is not a directory")
        if not os.access(parent, os.W_OK):
            raise CheckpointError(f"{option} {out}: {parent} is not writable")
    except (OSError, ValueError, RuntimeError) as error:
        raise _unusable(out, option, error) from error


def require_apart(out: Path, inputs: Inputs, *, option: str = "--out") -> None:
    """Refuse a target that holds, is or lies inside an input, or the directory that the user stands in.

    Raises:
        ConfigError
    """
    try:
        whole = _resolved(out)
        for name, given in inputs:
            if not given.exists():  # whoever reads it says why
                continue
            if _holds(_resolved(given), whole) and given.is_dir() and _resolved(given) != whole:
                raise ConfigError(f"{option} {out} lies inside {name} {given}; choose another directory")
            for path in (given, *(given.iterdir() if given.is_dir() else ())):
                if _holds(whole, _resolved(path)):
                    raise ConfigError(f"{option} {out} would replace {name} {given}; choose another directory")
        if _holds(whole, Path.cwd()):
            raise ConfigError(f"{option} {out} is, or holds, the current directory; choose another directory")
    except (OSError, ValueError, RuntimeError) as error:
        raise _unusable(out, option, error) from error


def _resolved(path: Path) -> Path:
    """The path without links.

    Raises:
        OSError, RuntimeError: too long a name, or links that go round.
    """
    whole = path.expanduser().resolve()
    with suppress(FileNotFoundError, NotADirectoryError):
        whole.stat()
    return whole


def _holds(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer` or below it, whatever the file system thinks of upper and lower case."""
    if outer in (inner, *inner.parents):
        return True
    if not outer.exists():
        return False
    return any(path.exists() and os.path.samefile(path, outer) for path in (inner, *inner.parents))


def _unusable(out: Path, option: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{option} {out} cannot be used: {getattr(error, 'strerror', None) or error}")


# --- locks and leftovers ----------------------------------------------------------------------------------------------


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target` against every other care process for as long as the context lasts.

    Raises:
        CheckpointError: another one holds it.
    """
    path = beside(_resolved(target), ".lock")
    if target.exists() and not os.access(path.parent, os.W_OK):  # then nobody can put another in its place
        yield
        return
    lock = FileLock(path)
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if not path.exists():
                raise CheckpointError(f"{path} cannot be written, which locks {target}") from error
            raise CheckpointError(f"{target} is being written by another care process; wait for it to end") from error
    try:
        yield
    finally:
        with uninterrupted():
            path.unlink(missing_ok=True)
            lock.release()


def _sweep(out: Path) -> None:
    """Put back, or remove, what a killed process left beside a target that this one holds."""
    for old in _beside(out, ".replaced-"):
        if not out.exists():
            old.rename(out)
            _log.warning("%s is back; a run that was killed while replacing it had moved it aside", out)
        else:
            remove(old)
    for partial in _beside(out, ".partial-"):
        remove(partial)
        _log.warning("removed %s, which a killed run had left", partial)


def _beside(out: Path, suffix: str) -> list[Path]:
    """Directories of care's own beside `out`, named after it."""
    prefix = beside(out, suffix).name
    found = [path for path in out.parent.iterdir() if path.name.startswith(prefix) and path.is_dir()]
    return [path for path in found if not path.is_symlink() and (_marked(path) is not None or not any(path.iterdir()))]


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for what need not stay, on the disk of temporary files; those of killed processes are removed."""
    root = Path(tempfile.gettempdir())
    for left in [path for path in root.glob("care-mla-*") if _marked(path) is not None]:
        lock = FileLock(left / ".lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        lock.release()
        remove(left)
        _log.warning("removed %s, which a killed run had left", left)
    with vanishing(root / f"care-mla-{token_hex(8)}") as directory:
        with writing(directory):
            directory.mkdir(mode=0o700)
        with FileLock(directory / ".lock"):
            mark(directory, Kind.SCRATCH)  # only now may another process look whether the lock is free
            yield directory


@contextmanager
def workspace(staging: Path, name: str = "work") -> Iterator[Path]:
    """A directory inside an output that is being made, for what need not stay; gone before the output is whole."""
    with vanishing(staging / name) as work:
        with writing(work):
            work.mkdir()
        yield work


# --- outputs ----------------------------------------------------------------------------------------------------------


class Claim:
    """An output directory that this process alone may write."""

    def __init__(self, out: Path, kind: Kind, overwrite: bool):
        self.out, self.kind, self.overwrite = out, kind, overwrite

    @contextmanager
    def staging(self, needed_bytes: int = 0) -> Iterator[Path]:
        """A directory that becomes the output on success and vanishes on any error, Ctrl-C included.

        Args:
            needed_bytes: checked against the free space before anything is written.

        Raises:
            CheckpointError: a full disk, or a target that came into being meanwhile.
        """
        out = self.out
        free = shutil.disk_usage(out.parent).free
        if needed_bytes > free:
            raise CheckpointError(
                f"{out.parent} has {free / 1e6:,.1f} MB free, {needed_bytes / 1e6:,.1f} MB are needed"
            )
        with vanishing(beside(out, f".partial-{token_hex(4)}")) as staging:
            with writing(staging):
                staging.mkdir()
            mark(staging, self.kind)
            yield staging
            mark(staging, self.kind, [name for name in _files_below(staging) if name != MARK])
            with writing(out), uninterrupted():
                self._appear(staging)
                sync(out.parent)

    def _appear(self, staging: Path) -> None:
        """Give the staging directory the output's name; what had it is moved aside and removed after."""
        out = self.out
        try:
            require_replaceable(out, self.kind, self.overwrite)
        except CheckpointError as error:
            kept = next(path for n in range(2, 1000) if not os.path.lexists(path := out.with_name(f"{out.name}-{n}")))
            staging.rename(kept)
            raise CheckpointError(f"{error}. It came into being meanwhile; what was made is in {kept}") from error
        retired = beside(out, f".replaced-{token_hex(4)}")
        try:
            if out.exists() and any(out.iterdir()):
                out.rename(retired)
            staging.rename(out)
        except BaseException:
            if retired.exists() and not out.exists():
                retired.rename(out)
            raise
        if retired.exists():
            remove(retired)


def require_output(out: Path, kind: Kind, inputs: Inputs = (), *, overwrite: bool = False) -> None:
    """What `claim` would refuse, before anything is read or locked.

    Raises:
        CheckpointError
    """
    require_apart(out, inputs)
    require_replaceable(out, kind, overwrite)


@contextmanager
def claim(
    out: Path, kind: Kind, inputs: Inputs = (), *, overwrite: bool = False, shared: bool = False
) -> Iterator[Claim]:
    """Hold an output directory while it is made; what a killed process left of it is removed.

    Args:
        inputs: what the command reads; none of it may be, hold or lie around `out`.
        shared: whether the processes that torchrun started share this work; then one of them calls this.

    Raises:
        CheckpointError: it may not be written, see `require_output`, or another process is writing it.
        ConfigError: several processes would each do all of the work.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and not shared:
        raise ConfigError(
            f"{processes} processes were started, and each would write {out}; start one (`care heal` alone shares work)"
        )
    require_output(out, kind, inputs, overwrite=overwrite)
    whole = _resolved(out)
    with ExitStack() as made:
        for path in reversed([path for path in whole.parents if not path.exists()]):
            made.enter_context(vanishing(path, if_empty=True))
        with writing(out):
            whole.parent.mkdir(parents=True, exist_ok=True)
        with locked(whole):
            _sweep(whole)
            require_replaceable(
                out, kind, overwrite
            )  # another process may have ended between the first look and the lock
            yield Claim(whole, kind, overwrite)
