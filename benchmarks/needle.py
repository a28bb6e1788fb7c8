"""Copying a random string over a distance: does long-range attention survive a conversion to layout mla?

    python benchmarks/needle.py --model build/smollm2-135m --data ../shared/data --work build/needle

A string of random tokens, random tokens up to the distance, and the string again: the share of its tokens that are the model's
first choice given those before (the first `LEAD` only say which string is meant). Calibrated on C4 at windows of 512 (64 x 512
tokens, seed 42), selection made for `--context 8192`, 50% saved. Writes benchmarks/results/needle.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from fidelity import split_texts
from rich import print as show
from transformers import PreTrainedModel

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.pipeline import versions, write_json

DISTANCES = (500, 1500)
STRING, LEAD, SAMPLES = 32, 4, 20
CONVERSIONS: dict[str, dict[str, Any]] = {
    "free": {"rope": "free"},
    "stock": {"rope": "stock"},
    "transmla": {"rope": "transmla", "method": "balanced_pca", "ranks": "uniform"},
}


@torch.no_grad()
def copied(model: PreTrainedModel, distance: int) -> float:
    """Share of the repeated string's tokens after its first `LEAD` that the model predicts first."""
    generator = torch.Generator().manual_seed(distance)
    right = 0
    for _ in range(SAMPLES):
        tokens = torch.randint(100, model.config.get_text_config().vocab_size, (distance,), generator=generator)
        ids = torch.cat([tokens, tokens[:STRING]])
        logits = model(ids[None], use_cache=False, logits_to_keep=STRING - LEAD + 1).logits[0, :-1]
        right += int((logits.argmax(-1) == ids[-(STRING - LEAD) :]).sum())
    return right / (SAMPLES * (STRING - LEAD))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "needle.json")
    arguments = parser.parse_args()
    quiet_libraries()
    calibration, _ = split_texts(arguments.data, arguments.work / "text")
    stats = arguments.work / "stats-c4-512"
    if not stats.is_dir():
        care_mla.calibrate(
            arguments.model, stats, calibration=calibration["c4"], samples=64, seqlen=512, seed=42, fisher=True
        )
    rows: list[dict[str, Any]] = []
    for name in ("original", *CONVERSIONS):
        directory: str | Path = arguments.model
        if name != "original":
            directory = arguments.work / "needle-mla"
            care_mla.convert(
                arguments.model, directory, stats=stats, overwrite=True, kv_save=0.5, layout="mla", qk_rope_head_dim=64,
                context=8192, **CONVERSIONS[name],
            )  # fmt: skip
        model = care_mla.load(directory)
        rows.append({"model": name, **{str(distance): copied(model, distance) for distance in DISTANCES}})
        show(rows[-1])
    write_json(arguments.json, {"versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
