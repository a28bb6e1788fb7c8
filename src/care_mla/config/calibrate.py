"""Settings of `care calibrate`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from care_mla.config.base import LARGEST_SEED, TEXT_PANEL, Option, Settings


class TextSettings(Settings):
    """What text the statistics come from.

    Attributes:
        calibration: SPEC, see `text.windows.make_windows`.
        pack: windows at random positions of the joined text; otherwise one padded window a document.
    """

    calibration: Annotated[
        str,
        Option(
            "Text to calibrate on: alpaca, wikitext2, c4, ptb; a .txt, .json, .jsonl or .parquet file; `self` (sampled from the "
            "model); `copy` (random strings said twice, which show how a model copies); or a mix such as alpaca:0.5,file.jsonl:0.5.",
            metavar="SPEC",
            also=("dataset", "data", "text", "corpus", "calib", "calibration-data", "calib-dataset"),
        ),
    ] = "self"
    samples: Annotated[
        int,
        Option(
            "Calibration windows.", TEXT_PANEL, also=("num-samples", "nsamples", "n-samples", "num-calibration-samples")
        ),
        Field(ge=1),
    ] = 128
    seqlen: Annotated[
        int,
        Option(
            "Tokens in a window.",
            TEXT_PANEL,
            also=("seq-len", "sequence-length", "max-length", "max-seq-length", "length"),
        ),
        Field(ge=2),
    ] = 256
    field: Annotated[
        str | None,
        Option(
            "Field of a record that holds the text, or the messages of a chat.",
            TEXT_PANEL,
            default="found",
            metavar="NAME",
            also=("column", "text-column", "text-field"),
        ),
    ] = None
    pack: Annotated[bool, Option("Windows of the joined text, or one padded window a document.", TEXT_PANEL)] = True
    seed: Annotated[
        int,
        Option("Seed of the window positions and of what the model samples.", TEXT_PANEL),
        Field(ge=-LARGEST_SEED, le=LARGEST_SEED),
    ] = 42
    batch_size: Annotated[
        int, Option("Windows in one forward pass.", TEXT_PANEL, also=("batch", "bs", "micro-batch-size")), Field(ge=1)
    ] = 8


class CalibrationSettings(TextSettings):
    """What statistics are collected, and from what text.

    Attributes:
        inputs: also the D x D input moment.
        normalized: also normalized queries and keys beside the layer's input, for linearized QK-norm.
        fisher: also a backward pass for Fisher statistics.
    """

    fisher: Annotated[
        bool,
        Option(
            "Run a backward pass for the Fisher statistics that method fisher, the default of `care convert`, needs."
        ),
    ] = True
    inputs: Annotated[
        bool, Option("Also collect D x D input moments, for --method care_c and --q-lora-rank.", "Advanced: statistics")
    ] = False
    normalized: Annotated[
        bool, Option("Also collect normalized queries and keys, for --qk-norm linear.", "Advanced: statistics")
    ] = False
