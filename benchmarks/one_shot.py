"""One-shot perplexity of every method, layout and budget, through the public pipeline.

    python benchmarks/one_shot.py --model build/smollm2-135m --data DATA

Calibration: wikitext2/valid.tokens.txt, 128 windows of 256 tokens, seed 42. Evaluation: the first 8 windows of 512 tokens of
test.tokens.txt and of test.raw.txt. Writes benchmarks/results/one_shot.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.evaluation import evaluate_model, evaluation_windows
from care_mla.pipeline import versions, write_json
from care_mla.text import load_text, load_tokenizer

RECIPES = [
    ("svd", "split", "uniform"),
    ("asvd", "split", "uniform"),
    ("care_c", "split", "uniform"),
    ("svd_llm", "split", "uniform"),
    ("care", "split", "uniform"),
    ("care", "split", "care"),
    ("svd", "joint", "uniform"),
    ("asvd", "joint", "uniform"),
    ("care", "joint", "uniform"),
    ("care", "joint", "care"),
    ("care", "joint", "energy"),
    ("fisher", "split", "fisher"),
    ("fisher", "joint", "uniform"),
    ("fisher", "joint", "fisher"),
]
BUDGETS = (0.5, 0.75, 0.875)
TEXTS = {"tokens": "wikitext2/test.tokens.txt", "raw": "wikitext2/test.raw.txt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "one_shot.json")
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console()

    tokenizer = load_tokenizer(Path(arguments.model))
    windows = {
        name: evaluation_windows(tokenizer, load_text(str(arguments.data / file)), seqlen=512, windows=8)
        for name, file in TEXTS.items()
    }

    def perplexities(directory: str | Path) -> dict[str, float]:
        model = care_mla.load(directory)
        return {name: evaluate_model(model, rows).perplexity for name, rows in windows.items()}

    rows = [{"method": "original", "kv_save": 0.0, **perplexities(arguments.model)}]
    console.print(rows[0])
    with tempfile.TemporaryDirectory() as work:
        stats = care_mla.calibrate(
            arguments.model,
            Path(work) / "stats",
            calibration=str(arguments.data / "wikitext2/valid.tokens.txt"),
            inputs=True,
            fisher=True,
        )
        for kv_save in BUDGETS:
            for method, layout, ranks in RECIPES:
                out = Path(work) / "converted"
                care_mla.convert(
                    arguments.model,
                    out,
                    stats=stats,
                    method=method,
                    layout=layout,
                    ranks=ranks,
                    kv_save=kv_save,
                    overwrite=True,
                )
                rows.append(
                    {"method": method, "layout": layout, "ranks": ranks, "kv_save": kv_save, **perplexities(out)}
                )
                console.print(rows[-1])

    arguments.json.parent.mkdir(exist_ok=True)
    write_json(arguments.json, {"model": "SmolLM2-135M-Instruct", "versions": versions(), "rows": rows})
    for text in TEXTS:
        table = Table(title=f"perplexity, test.{text}.txt, 8 x 512 tokens; original {rows[0][text]:.2f}")
        for column in ("method", "layout", "ranks", *(f"{100 * b:g}% saved" for b in BUDGETS)):
            table.add_column(column, justify="right" if "saved" in column else "left")
        for recipe in RECIPES:
            values = [r[text] for r in rows[1:] if (r["method"], r["layout"], r["ranks"]) == recipe]
            table.add_row(*recipe, *(f"{value:.2f}" for value in values))
        console.print(table)


if __name__ == "__main__":
    main()
