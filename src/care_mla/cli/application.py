"""The typer application that the subcommands register with."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

import typer

from care_mla import __version__

app = typer.Typer(
    name="care",
    help="Turn a pretrained MHA/GQA language model into Multi-head Latent Attention, and measure what it costs.",
    epilog="Start with `care inspect MODEL`, then `care convert MODEL --kv-save 0.5 --out OUT`. Every command explains itself: care convert --help.",
    no_args_is_help=False,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"care-mla {__version__}")
        raise typer.Exit


@app.callback()
def care(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Turn a pretrained MHA/GQA language model into Multi-head Latent Attention, and measure what it costs."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def say_what_was_meant(error: Any) -> str:
    """A usage error of the parser as a sentence; a word that is nearly an option, or means one, is answered with it."""
    text = str(error.format_message())
    word = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    if word is None or context is None or type(error).__name__ != "NoSuchOption":
        return text
    from care_mla.cli.adapter import SYNONYMS

    known = [flag for parameter in context.command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    synonyms = SYNONYMS.get(context.command.callback.__name__, {}) if context.command.callback else {}
    meant = synonyms.get(word) or next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)
    if meant is None:
        close = difflib.get_close_matches(word, synonyms, n=1, cutoff=0.8)
        meant = synonyms[close[0]] if close else None
    hint = f"; did you mean {meant}?" if meant else f"; care {context.info_name} --help lists the options"
    return f"no such option: {word}{hint}"
