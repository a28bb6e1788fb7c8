"""Copying a random string over a distance: does long-range attention survive a conversion to layout mla?

    python benchmarks/needle.py --model build/smollm2-135m --data DATA --work build/needle

A string of random tokens, random tokens up to the distance, and the string again: the share of its tokens that are the model's
first choice given those before (the first `LEAD` only say which string is meant). Calibrated at windows of 512, seed 42, on C4 (64
of them), or on C4 and 16 windows of other random strings said twice (`--calibration c4:0.8,copy:0.2`); selection made for
`--context 8192`, 50% saved. Writes benchmarks/results/needle.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fidelity import Rows, parser_of, split_texts
from transformers import PreTrainedModel

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.pipeline import versions, write_json

DISTANCES = (500, 1500)
STRING, LEAD, SAMPLES = 32, 4, 20
MLA = {"layout": "mla", "context": 8192}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "joint": {},
    "mla, free": {**MLA, "rope": "free"},
    "mla, stock": {**MLA, "rope": "stock"},
    "mla, transmla": {
        **MLA, "rope": "transmla", "method": "balanced_pca", "ranks": "uniform", "qk_rope_head_dim": 64,
    },
}  # fmt: skip


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
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "needle.json")
    arguments = parser.parse_args()
    quiet_libraries()
    calibration, _ = split_texts(arguments.data, arguments.work / "text")
    rows = Rows(arguments.work / "needle.jsonl")

    def measure(key: str, directory: str | Path, width: int | None = None) -> None:
        model = care_mla.load(directory)
        rows.add(key, {"rotary_width": width, **{str(distance): copied(model, distance) for distance in DISTANCES}})

    if "original" not in rows.done:
        measure("original", arguments.model)
    for calibrated, spec, samples in (("c4", "{}", 64), ("c4 and copy", "{}:0.8,copy:0.2", 80)):
        stats = arguments.work / f"stats-{calibrated.replace(' ', '-')}-512"
        if not stats.is_dir():
            text = {"calibration": spec.format(calibration["c4"]), "samples": samples, "seqlen": 512, "seed": 42}
            care_mla.calibrate(arguments.model, stats, fisher=True, **text)
        for name, options in CONVERSIONS.items():
            key = f"{calibrated}, {name}"
            if key not in rows.done:
                directory = arguments.work / "needle-mla"
                manifest = care_mla.convert(
                    arguments.model, directory, stats=stats, overwrite=True, kv_save=0.5, **options
                )
                measure(key, directory, manifest["recipe"]["qk_rope_head_dim"])
    write_json(arguments.json, {"versions": versions(), "rows": list(rows.done.values())})


if __name__ == "__main__":
    main()
