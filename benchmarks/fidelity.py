"""Loss of the default conversion as a fraction of CARE-U's, over corpora, window lengths and seeds; multiple-choice accuracy.

    python benchmarks/fidelity.py --model build/smollm2-135m --data DATA --work build/fidelity

Every conversion goes through the public pipeline: CARE-U is `--method care --layout split --ranks uniform`, ours is
`care convert SOURCE --kv-save X` with nothing else said, both from the same statistics (128 x 256 tokens) at the same number of
cached elements. Calibrated on WikiText-2 validation, C4 documents 0-149, Alpaca items 0-499, or text that the model writes
itself; evaluated on WikiText-2 test, C4 documents 220-299 and Alpaca items 700-998, which no option was ever chosen on. What is
finished is kept in --work, so an interrupted run goes on where it was, and several may share the corpora between them
(--calibrations); a last run over all of them makes the tables. Writes benchmarks/results/fidelity.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich import print as show
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.evaluation import evaluation_windows
from care_mla.modeling import CACHE_NAME, cache_of
from care_mla.pipeline import versions, write_json
from care_mla.text import load_text, load_tokenizer
from care_mla.text.tokens import tokenize

BUDGETS = (0.5, 0.75, 0.875)
WINDOWS = {512: 8, 2048: 2}
RECIPES: dict[str, dict[str, str]] = {
    "care-u": {"method": "care", "layout": "split", "ranks": "uniform"},
    "default": {},
}
CHOICE_ITEMS = 300
CHOICE_FILES = {"ARC-E": "choice/arc_easy.jsonl", "PIQA": "choice/piqa.jsonl"}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Arguments of all benchmarks that convert the model on texts of the data folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="what is finished is kept here")
    return parser


def split_texts(data: Path, work: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Calibration and evaluation text by corpus; records are dealt out to files of their own."""
    work.mkdir(parents=True, exist_ok=True)
    documents = (data / "c4/c4_300.jsonl").read_text(encoding="utf-8").splitlines()
    items = json.loads((data / "alpaca/alpaca_999.json").read_text(encoding="utf-8"))
    files = {
        "c4-calibration.jsonl": "\n".join(documents[:150]),
        "c4-evaluation.jsonl": "\n".join(documents[220:]),
        "alpaca-calibration.json": json.dumps(items[:500]),
        "alpaca-evaluation.json": json.dumps(items[700:]),
    }
    for name, content in files.items():
        (work / name).write_text(content, encoding="utf-8")
    calibration = {
        "wikitext2": str(data / "wikitext2/valid.tokens.txt"),
        "c4": str(work / "c4-calibration.jsonl"),
        "alpaca": str(work / "alpaca-calibration.json"),
        "self": "self",
    }
    evaluation = {
        "wikitext2": str(data / "wikitext2/test.tokens.txt"),
        "c4": str(work / "c4-evaluation.jsonl"),
        "alpaca": str(work / "alpaca-evaluation.json"),
    }
    return calibration, evaluation


@torch.no_grad()
def choice_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> dict[str, float]:
    """Share of the first items whose gold choice is the likeliest continuation: by sum of log-probabilities, and per byte."""
    right = {"plain": 0, "per_byte": 0}
    lines = path.read_text(encoding="utf-8").splitlines()[:CHOICE_ITEMS]
    for item in map(json.loads, lines):
        query = tokenize(tokenizer, item["query"].rstrip() + "\nAnswer:")
        choices = [choice.strip() for choice in item["choices"]]
        answers = [tokenize(tokenizer, " " + choice) for choice in choices]
        read = model(query[None], use_cache=True, logits_to_keep=1)  # the query once, its cache for every choice
        cache_of(read).batch_repeat_interleave(len(choices))
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)  # on the right: no earlier token sees it
        rest = model(padded, **{CACHE_NAME: cache_of(read)}, use_cache=True).logits
        predictions = torch.cat([read.logits.expand(len(choices), -1, -1), rest], dim=1).log_softmax(-1)
        scores = []
        for answer, predicted, choice in zip(answers, predictions, choices, strict=True):
            likelihood = float(predicted[: len(answer)].gather(1, answer[:, None]).sum())
            scores.append((likelihood, likelihood / len(choice.encode())))
        for which, name in enumerate(right):
            right[name] += max(range(len(scores)), key=lambda i: scores[i][which]) == item["gold"]
    return {name: count / len(lines) for name, count in right.items()}


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Cross entropy over windows [count, seqlen], nats per predicted token."""
    losses = [cross_entropy(model(row[None], use_cache=False).logits[0, :-1].float(), row[1:]) for row in windows]
    return float(torch.stack(losses).mean())


class Rows:
    """Results on disk, one JSON line a model; a finished one is not measured again."""

    def __init__(self, path: Path):
        self.path = path
        self.done = {
            line["key"]: line for line in map(json.loads, path.read_text().splitlines() if path.is_file() else [])
        }

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.done[key] = {"key": key, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(self.done[key]) + "\n")
        show(self.done[key])


def measure(arguments: argparse.Namespace, rows: Rows) -> None:
    """Everything that is not measured yet."""
    calibration, evaluation = split_texts(arguments.data, arguments.work / "text")
    tokenizer = load_tokenizer(Path(arguments.model))
    windows = {
        (text, seqlen): evaluation_windows(tokenizer, load_text(file), seqlen=seqlen, windows=count)
        for (text, file), (seqlen, count) in product(evaluation.items(), WINDOWS.items())
    }

    def losses(model: PreTrainedModel) -> dict[str, float]:
        return {f"{text} {seqlen}": mean_loss(model, ids) for (text, seqlen), ids in windows.items()}

    def choices(model: PreTrainedModel) -> dict[str, Any]:
        return {name: choice_accuracy(model, tokenizer, arguments.data / file) for name, file in CHOICE_FILES.items()}

    if "original" not in rows.done:
        original = care_mla.load(arguments.model)
        rows.add("original", {"losses": losses(original), "choices": choices(original)})
    first = (arguments.seeds[0], arguments.calibrations[0])
    for seed, corpus in product(arguments.seeds, arguments.calibrations):
        stats = arguments.work / f"stats-{corpus}-{seed}"
        if not stats.is_dir():
            care_mla.calibrate(arguments.model, stats, calibration=calibration[corpus], seed=seed, fisher=True)
        for kv_save, (recipe, options) in product(BUDGETS, RECIPES.items()):
            key = f"{corpus} {seed} {kv_save} {recipe}"
            if key in rows.done:
                continue
            out = arguments.work / f"converted-{corpus}-{seed}"
            manifest = care_mla.convert(arguments.model, out, stats=stats, kv_save=kv_save, overwrite=True, **options)
            model = care_mla.load(out)
            row: dict[str, Any] = {
                "calibration": corpus,
                "seed": seed,
                "kv_save": kv_save,
                "recipe": recipe,
                "cache_elements": manifest["cache_elements_per_token"],
                "predicted_loss_increase": manifest["predicted_loss_increase"],
                "losses": losses(model),
            }
            if (seed, corpus) == first and not arguments.skip_choices:
                row["choices"] = choices(model)
            rows.add(key, row)


def fractions(rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Loss increase of the default as a fraction of CARE-U's, one record for each calibration, budget, text and window."""
    original = rows["original"]["losses"]
    pairs: dict[tuple[Any, ...], dict[int, tuple[float, float]]] = {}
    for ours in (row for row in rows.values() if row.get("recipe") == "default"):
        theirs = rows.get(ours["key"].replace("default", "care-u"))
        for text in original if theirs else ():
            increases = tuple(row["losses"][text] - original[text] for row in (ours, theirs))
            pairs.setdefault((ours["calibration"], ours["kv_save"], text), {})[ours["seed"]] = increases
    for (corpus, kv_save, text), seeds in pairs.items():
        values = [ours / theirs for ours, theirs in seeds.values()]
        yield {
            "calibration": corpus,
            "kv_save": kv_save,
            "text": text,
            "seeds": len(values),
            "mean": statistics.mean(values),
            "low": min(values),
            "high": max(values),
            "default_nats": statistics.mean(ours for ours, _ in seeds.values()),
            "care_u_nats": statistics.mean(theirs for _, theirs in seeds.values()),
        }


def markdown(records: list[dict[str, Any]], rows: dict[str, Any]) -> str:
    """The tables of docs/results/fidelity.md."""
    texts = list(rows["original"]["losses"])
    lines = [f"| calibrated on | saved | {' | '.join(texts)} |", "|-|-|" + "-|" * len(texts)]
    for corpus, kv_save in dict.fromkeys((r["calibration"], r["kv_save"]) for r in records):
        cells = {r["text"]: r for r in records if (r["calibration"], r["kv_save"]) == (corpus, kv_save)}
        shown = [f"{c['mean']:.3f} ({c['low']:.3f}..{c['high']:.3f})" for c in (cells[text] for text in texts)]
        lines.append(f"| {corpus}, {cells[texts[0]]['seeds']} seeds | {100 * kv_save:g}% | {' | '.join(shown)} |")
    names = [f"{task}, {how}" for task in CHOICE_FILES for how in ("plain", "per_byte")]
    lines += ["", f"| model | {' | '.join(names)} |", "|-|" + "-|" * len(names)]
    for row in (row for row in rows.values() if "choices" in row):
        name = f"{row['recipe']}, {100 * row['kv_save']:g}%" if "recipe" in row else "original"
        values = [row["choices"][task][how] for task in CHOICE_FILES for how in ("plain", "per_byte")]
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--calibrations", nargs="+", default=["c4", "wikitext2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--skip-choices", action="store_true", help="leave multiple choice to another run")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "fidelity.json")
    arguments = parser.parse_args()
    quiet_libraries()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = Rows(arguments.work / "rows.jsonl")
    measure(arguments, rows)
    records = list(fractions(rows.done))
    write_json(arguments.json, {"versions": versions(), "fractions": records, "rows": list(rows.done.values())})
    print(markdown(records, rows.done))


if __name__ == "__main__":
    main()
