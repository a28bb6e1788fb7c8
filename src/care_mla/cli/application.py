"""The typer application that the subcommands register with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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


COMMAND_SYNONYMS = {
    **dict.fromkeys(("compress", "quantize", "mla", "transform"), "convert"),
    **dict.fromkeys(("finetune", "train", "distill", "fine-tune"), "heal"),
    **dict.fromkeys(("eval", "ppl", "perplexity", "benchmark", "test"), "evaluate"),
    **dict.fromkeys(("download", "pull", "get"), "fetch"),
    **dict.fromkeys(("info", "show", "describe"), "inspect"),
    **dict.fromkeys(("stats", "collect"), "calibrate"),
    **dict.fromkeys(("forecast", "predict", "ranks"), "plan"),
    **dict.fromkeys(("save", "deepseek"), "export"),
}


def say_what_was_meant(error: Any) -> str:
    """A usage error of the parser as a sentence; a word that is nearly an option or a command, or means one, is answered with it."""
    text = str(error.format_message()).replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    word = getattr(error, "option_name", None)
    if context is None:
        return text
    if text.startswith("No such command"):
        word = text.split("'")[1]
        commands = list(context.command.commands)
        meant = COMMAND_SYNONYMS.get(word) or _nearest(word, commands)
        return f"no such command: {word}" + (
            f"; did you mean care {meant}?" if meant else f"; there are {', '.join(sorted(commands))}"
        )
    if type(error).__name__ != "NoSuchOption" or word is None:
        return text
    from care_mla.cli.adapter import SYNONYMS

    known = [flag for parameter in context.command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    synonyms = SYNONYMS.get(context.info_name, {})
    meant = synonyms.get(word) or _nearest(word, known) or synonyms.get(_nearest(word, synonyms) or "")
    hint = f"; did you mean {meant}?" if meant else f"; care {context.info_name} --help lists the options"
    return f"no such option: {word}{hint}"


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)), None)
