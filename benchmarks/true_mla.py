"""Layout mla against TransMLA's transformation at the same cache: rotary selection alone, and full MLA.

    python benchmarks/true_mla.py --model build/smollm2-135m --data DATA --work build/true_mla

Calibrated on 128 x 256 tokens of WikiText-2 validation and of C4, seed 42; evaluated on WikiText-2 test at windows of 8 x 512 and
4 x 2048 tokens, with one selection made for `--context 8192`. `transmla`: real PCA per frequency, first component, balanced PCA,
uniform ranks; also with FreqFold 2, which makes it stronger. --work may be that of fidelity.py, whose statistics serve. Writes benchmarks/results/true_mla.json.

Windows of 8192 take ten minutes a row on one core, and some 6 GB; the table of docs/results/true-mla.md is of

    python benchmarks/true_mla.py ... --seqlens 8192 --calibrations wikitext2 --recipes transmla stock free --budgets 2 \
        --work build/true_mla_8192 --json benchmarks/results/true_mla_8192.json
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from fidelity import Rows, mean_loss, split_texts

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.evaluation import evaluation_windows
from care_mla.pipeline import versions, write_json
from care_mla.text import load_text, load_tokenizer

WINDOWS = {512: 8, 2048: 4, 8192: 2}
BASELINE = {"method": "balanced_pca", "rope": "transmla", "ranks": "uniform"}
RECIPES: dict[str, dict[str, Any]] = {
    "transmla": BASELINE,
    "transmla, FreqFold 2": {**BASELINE, "freq_fold": 2},
    "stock": {"rope": "stock"},
    "free": {"rope": "free"},
}


def budgets(model: str) -> dict[str, dict[str, Any]]:
    """name -> options: the rotary key alone beside a latent of full width, then whole conversions."""
    geometry = care_mla.inspect(model).geometry
    whole = geometry.cache_elements_per_token + geometry.num_layers * 64
    return {
        "rotary key of 64, latent of full rank": {"cache_elements": whole, "qk_rope_head_dim": 64, "ranks": "uniform"},
        "50% saved, rotary key of 64": {"kv_save": 0.5, "qk_rope_head_dim": 64},
        "75% saved, rotary key of 32": {"kv_save": 0.75, "qk_rope_head_dim": 32},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="kept between runs")
    parser.add_argument("--calibrations", nargs="+", default=["wikitext2", "c4"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[512, 2048], choices=list(WINDOWS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--budgets", type=int, default=3, help="the first so many")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "true_mla.json")
    arguments = parser.parse_args()
    quiet_libraries()
    calibration, evaluation = split_texts(arguments.data, arguments.work / "text")
    text = load_text(evaluation["wikitext2"])
    tokenizer = load_tokenizer(Path(arguments.model))
    windows = {n: evaluation_windows(tokenizer, text, seqlen=n, windows=WINDOWS[n]) for n in arguments.seqlens}

    def losses(directory: str | Path) -> dict[str, float]:
        model = care_mla.load(directory)
        return {str(seqlen): mean_loss(model, rows) for seqlen, rows in windows.items()}

    rows = Rows(arguments.work / "true_mla.jsonl")
    if "original" not in rows.done:
        rows.add("original", {"losses": losses(arguments.model)})
    chosen = dict(list(budgets(arguments.model).items())[: arguments.budgets])
    for corpus in arguments.calibrations:
        stats = arguments.work / f"stats-{corpus}-42"
        if not stats.is_dir():
            care_mla.calibrate(arguments.model, stats, calibration=calibration[corpus], seed=42, fisher=True)
        for (budget, options), recipe in product(chosen.items(), arguments.recipes):
            key = f"{corpus}, {budget}, {recipe}"
            if key not in rows.done:
                out = arguments.work / f"mla-{corpus}"
                recipe_options = {**options, **RECIPES[recipe], "layout": "mla", "context": 8192}
                manifest = care_mla.convert(arguments.model, out, stats=stats, overwrite=True, **recipe_options)
                rows.add(
                    key,
                    {
                        "calibration": corpus,
                        "budget": budget,
                        "recipe": recipe,
                        "cache_elements": manifest["cache_elements_per_token"],
                        "predicted_loss_increase": manifest["predicted_loss_increase"],
                        "losses": losses(out),
                    },
                )

    original = rows.done["original"]["losses"]
    lengths = " | ".join(f"{n}: nats (of transmla)" for n in arguments.seqlens)
    print(f"| calibrated on | budget | recipe | {lengths} | predicted |\n{'|-' * (4 + len(windows))}|")
    for row in (row for row in rows.done.values() if "recipe" in row):
        baseline = rows.done[f"{row['calibration']}, {row['budget']}, transmla"]["losses"]
        cells = []
        for seqlen, loss in row["losses"].items():
            increase = loss - original[seqlen]
            cells.append(f"{increase:.3f} ({increase / (baseline[seqlen] - original[seqlen]):.2f})")
        predicted = f"{row['predicted_loss_increase']:.3f}"
        print(f"| {row['calibration']} | {row['budget']} | {row['recipe']} | {' | '.join(cells)} | {predicted} |")
    write_json(arguments.json, {"versions": versions(), "rows": list(rows.done.values())})


if __name__ == "__main__":
    main()
