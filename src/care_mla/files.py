"""The one place that writes files: under a temporary name beside the target, synced, renamed; a failure is one sentence.

Directories that appear whole are in `checkpoint.outputs`.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from care_mla.errors import CheckpointError
from care_mla.interrupts import uninterrupted

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"
_NAME_BYTES = 160
"""What of a name goes into those beside it; file systems allow 255 bytes, and a suffix comes after it."""
_vanishing: dict[Path, bool] = {}
"""Names of what is temporary now, in the order in which it was made, and whether it goes only if nothing is in it."""


def beside(path: Path, suffix: str) -> Path:
    """A hidden name beside `path`, of its own, however long its name is."""
    name = os.fsencode(path.name)
    if len(name) > _NAME_BYTES:
        name = name[:_NAME_BYTES] + hashlib.sha256(name).hexdigest()[:8].encode()
    return path.with_name(f".{os.fsdecode(name)}{suffix}")


@contextmanager
def vanishing(path: Path, *, if_empty: bool = False) -> Iterator[Path]:
    """A name for what need not stay: the file or directory that is made under it vanishes with the context, however that ends.

    The name is known before anything is made, and a signal does not cut the removal short. One between two instructions of
    these lines can still keep them from running; then it vanishes when the process ends.

    Args:
        if_empty: a directory that stays if something is in it.
    """
    _vanishing[path] = if_empty
    try:
        yield path
    except BaseException:
        _remove(path)
        raise
    with uninterrupted():
        _remove(path)
        _vanishing.pop(path, None)


def _remove(path: Path) -> None:
    """Remove what is temporary; what is still there is tried again at the end."""
    if path not in _vanishing:  # done, or a parent process's
        return
    with uninterrupted():
        with suppress(OSError):
            if _vanishing[path]:
                path.rmdir()
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if not os.path.lexists(path):
            del _vanishing[path]


@atexit.register
def remove_what_vanishes() -> None:
    """What is temporary is gone when the process ends."""
    for path in reversed(list(_vanishing)):
        _remove(path)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_vanishing.clear)  # they are the parent's


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: what the operating system says of writing `path`.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be written: {_reason(error, path)}") from error


def _reason(error: Exception, path: Path) -> str:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return f"the disk of {path.parent} is full, or a quota on it"
    return getattr(error, "strerror", None) or str(error).strip().splitlines()[0]


def sync(path: Path) -> None:
    """What was written to a file, or which names a directory has, survives a power cut."""
    if os.name != "posix" and path.is_dir():  # nothing to open there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when it is whole, and vanishes on any error.

    Devices and pipes (`/dev/stdout`) are written as they are.

    Raises:
        CheckpointError: it cannot be written; `path` is as it was then.
    """
    if _is_stream(path):
        with writing(path):
            yield path
        return
    with vanishing(beside(path, f".{os.getpid()}{PARTIAL}")) as temporary, writing(path):
        _sweep(path)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def _is_stream(path: Path) -> bool:
    """Whether a rename would put a file in the place of a device or a pipe."""
    return os.path.realpath(path.parent).startswith(("/dev", "/proc")) or (path.exists() and not path.is_file())


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` whose process is gone."""
    prefix = f"{beside(path, '').name}."
    for sibling in path.parent.iterdir():
        owner = sibling.name.removeprefix(prefix).removesuffix(PARTIAL)
        if sibling.name == f"{prefix}{owner}{PARTIAL}" and owner.isdigit() and not _is_running(int(owner)):
            sibling.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # signal 0 is not harmless elsewhere
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """A whole file.

    Raises:
        CheckpointError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """A whole UTF-8 file; bytes of a path that are not UTF-8 are written as escapes, which JSON reads back.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Pretty JSON with a final newline.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file; tensors from any device.

    Raises:
        CheckpointError: it cannot be written.
    """
    from safetensors.torch import save_file  # brings torch, which reading a config.json needs not

    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata=metadata)


def copy_file(source: Path, target: Path) -> None:
    """The content of a file; of a link, that of the file it names.

    Raises:
        CheckpointError: it cannot be written.
    """
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def append_line(path: Path, line: str) -> None:
    """One more line of a file that grows; a failure leaves it as it was.

    Raises:
        CheckpointError: it cannot be written.
    """
    content = line.encode("utf-8", errors="backslashreplace") + b"\n"
    with writing(path), uninterrupted(), path.open("ab", buffering=0) as file:
        length = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:
            file.truncate(length)
            raise


def require_own_file(path: Path, option: str) -> None:
    """Refuse to replace a file that care did not write; one that it wrote says "care-mla" in it.

    Raises:
        CheckpointError
    """
    try:
        foreign = path.is_dir() or (not _is_stream(path) and path.is_file() and b"care-mla" not in path.read_bytes())
        absent = not path.absolute().parent.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{option} {path} cannot be used: {_reason_of_path(error)}") from error
    if absent:
        raise CheckpointError(f"{option} {path}: {path.absolute().parent} is not a directory")
    if foreign:
        raise CheckpointError(f"{option} {path} exists and care did not write it; choose another name")


def _reason_of_path(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint directory.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # nested too deeply, a number of thousands of digits, not UTF-8
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
