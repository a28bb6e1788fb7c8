"""What healing gives back: perplexity on WikiText-2 test before and after, by saving, text, starting point and tokens.

    python benchmarks/heal.py --model build/smollm2-135m --data DATA --work build/heal

Models are converted from statistics of 128 x 256 tokens (seed 42) of WikiText-2 validation, where a row does not say otherwise, healed
with the defaults of `care heal` (factors alone, KL alone) on WikiText-2 validation or on C4 documents 0-149 and Alpaca items 0-499, and
evaluated on the first 8 x 512 tokens of WikiText-2 test, on which nothing was chosen. What is finished is kept in --work; `--rows` names some.
Writes benchmarks/results/heal.json and docs/results/healing.svg (KL on held-out blocks of the training text against tokens).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from fidelity import Rows, parser_of, split_texts

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.pipeline import versions, write_json
from care_mla.progress import rich_meter, rich_track

TRANSMLA = {"layout": "mla", "rope": "transmla", "method": "balanced_pca", "ranks": "uniform", "qk_rope_head_dim": 32}
WEB = ("c4", "alpaca")
EVALUATION = {"seqlen": 512, "windows": 8}


@dataclass(frozen=True)
class Setup:
    """A conversion and the text it is healed on.

    Attributes:
        recipe: of the conversion.
        tokens: budget of the healing.
        corpora: of the training text, in equal shares.
        calibration: corpora that the conversion was calibrated on.
        settings: of `care_mla.heal`, where not the defaults.
    """

    recipe: dict[str, Any]
    tokens: int
    corpora: tuple[str, ...] = ("wikitext2",)
    calibration: tuple[str, ...] = ("wikitext2",)
    settings: dict[str, Any] = field(default_factory=dict)


HIGH = {"lr": 3e-3}
LOW = {"lr": 5e-4}
SETUPS = {
    "75%, 64k": Setup({"kv_save": 0.75}, 64_000),
    "75%, lr 3e-3, 64k": Setup({"kv_save": 0.75}, 64_000, settings=HIGH),
    "75%, from svd, 64k": Setup(
        {"kv_save": 0.75, "method": "svd", "layout": "split", "ranks": "uniform"}, 64_000, settings=HIGH
    ),
    "75%, from care, 64k": Setup(
        {"kv_save": 0.75, "method": "care", "layout": "split", "ranks": "uniform"}, 64_000, settings=HIGH
    ),
    "75%, from transmla, 64k": Setup({"kv_save": 0.75, **TRANSMLA}, 64_000, settings=HIGH),
    "75%, CE 0.1, 64k": Setup({"kv_save": 0.75}, 64_000, settings={**HIGH, "ce_weight": 0.1}),
    "75%, 0.25M": Setup({"kv_save": 0.75}, 250_000),
    "75%, lr 3e-3, 0.25M": Setup({"kv_save": 0.75}, 250_000, settings=HIGH),
    "87.5%, lr 3e-3, 0.25M": Setup({"kv_save": 0.875}, 250_000, settings=HIGH),
    "87.5%, CE 0.1, 64k": Setup({"kv_save": 0.875}, 64_000, settings={**HIGH, "ce_weight": 0.1}),
    "87.5%, CE 0.1, 0.25M": Setup({"kv_save": 0.875}, 250_000, settings={**HIGH, "ce_weight": 0.1}),
    "87.5%, attention, 0.25M": Setup({"kv_save": 0.875}, 250_000, settings={"train": "attention"}),
    "75%, self, lr 5e-4, 0.25M": Setup({"kv_save": 0.75}, 250_000, ("self",), settings=LOW),
    "75%, c4 and alpaca, lr 5e-4, 0.25M": Setup({"kv_save": 0.75}, 250_000, WEB, settings=LOW),
    "75%, c4 and alpaca, lr 3e-3, 0.25M": Setup({"kv_save": 0.75}, 250_000, WEB, settings=HIGH),
    "75%, c4 and alpaca throughout, lr 1e-3, 0.25M": Setup({"kv_save": 0.75}, 250_000, WEB, WEB, {"lr": 1e-3}),
    "mla 50%, lr 3e-3, 64k": Setup({"kv_save": 0.5, "layout": "mla"}, 64_000, settings=HIGH),
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", nargs="*", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "heal.json")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "results" / "healing.svg")
    arguments = parser.parse_args()
    quiet_libraries()
    texts, tests = split_texts(arguments.data, arguments.work / "text")
    rows = Rows(arguments.work / "heal.jsonl")

    def spec(corpora: tuple[str, ...]) -> str:
        return ",".join(f"{texts[name]}:{1 / len(corpora)}" for name in corpora)

    for key in arguments.rows:
        if key in rows.done:
            continue
        setup = SETUPS[key]
        stats = arguments.work / f"stats-{'-'.join(setup.calibration)}"
        if not stats.is_dir():
            care_mla.calibrate(
                arguments.model,
                stats,
                fisher=True,
                calibration=spec(setup.calibration),
                samples=128,
                seqlen=256,
                seed=42,
            )
        healed = arguments.work / f"healed-{key.replace(', ', '-')}"
        one_shot = healed.with_name(f"{healed.name}.one-shot")
        unfinished = healed.with_name(f"{healed.name}.healing").is_dir()
        care_mla.convert(arguments.model, one_shot, stats=stats, overwrite=True, **setup.recipe)
        before = care_mla.evaluate(one_shot, tests["wikitext2"], reference=arguments.model, **EVALUATION)
        record = care_mla.heal(
            one_shot,
            healed,
            data=spec(setup.corpora),
            tokens=setup.tokens,
            teacher_top_k=64,
            teacher_logits=arguments.work / "logits",  # runs on the same text read them
            resume=unfinished,
            overwrite=True,
            name=key,
            track=rich_track,
            meter=rich_meter,
            **setup.settings,
        )
        after = care_mla.evaluate(healed, tests["wikitext2"], reference=arguments.model, **EVALUATION)
        names = ("perplexity", "reference_perplexity", "loss_increase", "kl", "top1_agreement")
        rows.add(
            key,
            {
                "before": {name: before[name] for name in names},
                "after": {name: after[name] for name in names},
                "closed": 1.0 - after["loss_increase"] / before["loss_increase"],
                "closed_kl": 1.0 - after["kl"] / before["kl"],
                **{name: record[name] for name in ("tokens", "tokens_per_second", "lr", "best_step", "step")},
                "evaluations": record["evaluations"],
            },
        )
        shutil.rmtree(one_shot)
        print(key, rows.done[key], flush=True)
    done = [rows.done[key] for key in SETUPS if key in rows.done]
    write_json(arguments.json, {"versions": versions(), "rows": done})
    draw(done, arguments.figure)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL to the original on held-out blocks against tokens, one line a row."""
    figure, axes = plt.subplots(figsize=(7.6, 5.2), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for row in rows:
        points = [(e["tokens"] / 1000, e["kl"]) for e in row["evaluations"]]
        axes.semilogy(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, label=row["key"])
    axes.set(xlabel="thousands of tokens", ylabel="KL on held-out text, nats per token")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.1g}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
