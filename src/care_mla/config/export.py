"""Settings of `care export`."""

from __future__ import annotations

from typing import Annotated

from care_mla.config.base import Option, Settings
from care_mla.names import ENGINES, EXPORT_TARGETS


class ExportSettings(Settings):
    """Which stock class is written, and for which engine."""

    target: Annotated[str, Option("Stock class to write.", choices=EXPORT_TARGETS, also=("format", "arch"))] = (
        EXPORT_TARGETS[0]
    )
    engine: Annotated[
        str,
        Option(
            "transformers takes any latent width; vllm a latent + rotary key of 320, 512 or 576.",
            choices=ENGINES,
            also=("for", "backend"),
        ),
    ] = ENGINES[0]
    kv_lora_rank: Annotated[int | None, Option("Pad all latents to this width.", default="as little as possible")] = (
        None
    )
