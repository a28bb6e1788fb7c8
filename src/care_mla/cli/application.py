"""The typer application that the subcommands register with."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="care",
    help="Turn a pretrained MHA/GQA language model into Multi-head Latent Attention, and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
