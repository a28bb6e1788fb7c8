"""`care convert --heal-tokens`: a conversion, and healing as its last stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from care_mla.checkpoint import Kind, claim, require_output
from care_mla.config import HealSettings
from care_mla.errors import ConversionError
from care_mla.files import read_json
from care_mla.healing.unfinished import Start, UnfinishedRun
from care_mla.pipeline.convert import convert
from care_mla.pipeline.heal import heal_pair
from care_mla.pipeline.inputs import inputs_of
from care_mla.pipeline.source import open_source
from care_mla.progress import MeterFactory, Track, silent
from care_mla.records.artifacts import MANIFEST
from care_mla.runtime import resolve_device


def convert_and_heal(
    source: str | Path,
    out: str | Path,
    *,
    heal_tokens: int,
    heal_data: str | None = None,
    overwrite: bool = False,
    device: str | int | torch.device | None = None,
    track: Track = silent,
    meter: MeterFactory | None = None,
    **conversion: Any,
) -> dict[str, Any]:
    """Convert a checkpoint and heal it as the last stage.

    Args:
        source, out, conversion: as of `convert`.
        heal_tokens: as `tokens` of `heal`; all else of the training is its defaults.
        heal_data: None: what the conversion was calibrated on.

    Returns:
        The manifest, the healing in it.

    Raises:
        ConversionError: nothing is left at `out` then. What is done so far is in `OUT.healing`, and the same call goes on with it.
    """
    from care_mla.healing.pair import open_pair
    from care_mla.healing.processes import make_accelerator, require_accelerate
    from care_mla.healing.text import require_text

    out = Path(out)
    unfinished = UnfinishedRun(out)
    text = heal_data or (conversion.get("calibration") or {}).get("calibration")
    inputs = inputs_of(source=source, stats=conversion.get("stats"), text=text)
    require_output(out, Kind.HEALED, inputs, overwrite=overwrite)
    unfinished.require_apart(inputs)
    # What the last stage would refuse is refused before the first.
    HealSettings.make(tokens=heal_tokens)
    where = resolve_device(device)
    require_accelerate()
    if heal_data is not None:
        require_text(heal_data, source)
    request = {
        "source": open_source(source).reader.fingerprint,
        "heal_tokens": heal_tokens,
        "heal_data": heal_data,
        "conversion": {key: str(value) if isinstance(value, Path) else value for key, value in conversion.items()},
    }
    with claim(out, Kind.HEALED, inputs, overwrite=overwrite) as claimed:
        unfinished.begin_conversion(request, overwrite=overwrite)
        try:
            if not unfinished.is_converted:
                convert(source, unfinished.one_shot, device=where, track=track, **conversion)
        except ConversionError:
            unfinished.remove()
            raise
        manifest = read_json(unfinished.one_shot / MANIFEST)
        calibration = manifest["calibration"]["settings"]
        resume = unfinished.has_started
        before = unfinished.start().settings if resume else {}
        trained_on = {
            "data": heal_data or calibration["calibration"],
            "field": calibration["field"] if heal_data is None else None,
        }
        settings: HealSettings = HealSettings.make(**{**before, **trained_on, "tokens": heal_tokens})
        pair = open_pair(unfinished.one_shot, None, f"{source}, converted")
        start = Start.of(pair, settings)
        unfinished.go_on(start) if resume else unfinished.begin_healing(start)
        record = heal_pair(
            pair,
            settings,
            make_accelerator(where, None, unfinished.directory),
            unfinished,
            claimed,
            resume=resume,
            track=track,
            meter=meter,
        )
    return {**manifest, "healing": [record]}
