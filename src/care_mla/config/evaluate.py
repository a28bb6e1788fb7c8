"""Settings of `care evaluate`."""

from __future__ import annotations

from typing import Annotated

from care_mla.config.base import Option, Settings


class EvaluationSettings(Settings):
    """What text a model is evaluated on: windows one after the other, from its beginning."""

    seqlen: Annotated[int, Option("Tokens in a window.", also=("seq-len", "sequence-length", "max-length"))] = 512
    windows: Annotated[
        int, Option("Windows from the beginning of the text.", also=("samples", "num-samples", "limit"))
    ] = 8
    field: Annotated[
        str | None,
        Option("Field of a record that holds the text.", default="found", metavar="NAME", also=("column",)),
    ] = None
