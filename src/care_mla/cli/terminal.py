"""How the commands write to the terminal: paths and messages as they are, never read as markup."""

from __future__ import annotations

import shlex
import sys

from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """A console that takes text as it is: `[/b]` and `:smile:` may be parts of a path."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(text: str, *, head: str = "", style: str = "", stderr: bool = False) -> None:
    """One line, as long as it is.

    Args:
        head: a word before it, in `style`.
    """
    line = Text.assemble((head, style), text) if head else Text(text)
    console(stderr=stderr).print(line, soft_wrap=True)


def take_any_character() -> None:
    """Bytes of a path that are not UTF-8 are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def quoted(word: object) -> str:
    """A word as a shell takes it."""
    return shlex.quote(str(word))
