"""Short memory, said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from care_mla.errors import ConfigError

_SAID = ("out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on whichever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


@contextmanager
def memory_named(what: str, device: torch.device, lower: str) -> Iterator[None]:
    """Where memory ran short, and what to lower.

    Args:
        what: was being done.
        lower: options that need less, as the end of a sentence.

    Raises:
        ConfigError: in place of torch's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory on {device} while {what}: {lower}") from error
