"""Writes the measured tables of docs/results and README.md: `python docs/make_results.py`. A test says when a page is out of date.

A page holds `<!-- table: NAME -->` and `<!-- end -->`; what stands between them is made here from benchmarks/results/*.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from math import exp
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

NUMBER = re.compile(r"(\*\*)?-?[\d.]*%?(\*\*)?( ms| \(.*\))?$")
"""Cells of a column of numbers; empty ones, too."""
METHODS = {
    "svd": "plain SVD",
    "asvd": "ASVD",
    "care_c": "CARE-C",
    "svd_llm": "SVD-LLM",
    "care": "CARE",
    "fisher": "fisher",
}
RANKS = {"uniform": "equal", "care": "Eq. 1", "energy": "energy", "fisher": "fisher"}
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "alpaca": "Alpaca"}
Row = dict[str, Any]


def pages() -> list[Path]:
    """All pages that hold a generated table."""
    return [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if MARKED.search(_text(page))]


def render(page: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", page)


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """A file of benchmarks/results."""
    found: dict[str, Any] = json.loads(_text(RESULTS / f"{name}.json"))
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; words on the left, numbers on the right."""
    rule = ["-:" if all(NUMBER.match(row[i]) for row in rows) else "-" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def percent(share: float) -> str:
    return f"{100 * share:g}%"


def saved(row: Row) -> str:
    return percent(row["kv_save"])


# --- one-shot ---------------------------------------------------------------------------------------------------------


def _one_shot(text: str) -> str:
    rows = read("one_shot")["rows"]
    budgets = list(dict.fromkeys(row["kv_save"] for row in rows if row["kv_save"]))
    recipes = dict.fromkeys((row["method"], row["layout"], row["ranks"]) for row in rows if row["kv_save"])
    lines = [["original", "", "", f"{rows[0][text]:.2f}", *[""] * (len(budgets) - 1)]]
    for recipe in recipes:
        found = {r["kv_save"]: r[text] for r in rows[1:] if (r["method"], r["layout"], r["ranks"]) == recipe}
        names = [METHODS[recipe[0]], recipe[1], RANKS[recipe[2]]]
        lines.append([*names, *(f"{found[budget]:.2f}" for budget in budgets)])
    if text == "tokens":
        losses = {r["key"]: exp(r["losses"]["wikitext2 512"]) for r in read("fidelity")["rows"]}
        found = [losses[f"wikitext2 42 {budget} default"] for budget in budgets]
        lines.append(["**the default**", "joint", "fisher", *(f"**{value:.2f}**" for value in found)])
    return table(["method", "layout", "ranks", *(f"{percent(budget)} saved" for budget in budgets)], lines)


# --- fidelity ---------------------------------------------------------------------------------------------------------


def _fractions(corpus: str) -> str:
    records = [r for r in read("fidelity")["fractions"] if r["calibration"] == corpus]
    texts = list(dict.fromkeys(r["text"] for r in records))
    lines = []
    for budget in sorted({r["kv_save"] for r in records}):
        cells = {r["text"]: r for r in records if r["kv_save"] == budget}
        lines.append([percent(budget), *(_spread(cells[text]) for text in texts)])
    return table(["saved", *(_windows(text) for text in texts)], lines)


def _spread(record: Row) -> str:
    mean = f"{record['mean']:.3f}"
    return mean if record["seeds"] == 1 else f"{mean} ({record['low']:.3f} to {record['high']:.3f})"


def _windows(text: str) -> str:
    corpus, length = text.split()
    return f"{TEXTS[corpus]}, {length}"


def _nats() -> str:
    records = read("fidelity")["fractions"]
    texts = list(dict.fromkeys(r["text"] for r in records))
    lines = []
    for corpus, budget in dict.fromkeys((r["calibration"], r["kv_save"]) for r in records):
        cells = {r["text"]: r for r in records if (r["calibration"], r["kv_save"]) == (corpus, budget)}
        for name, field in (("the default", "default_nats"), ("CARE-U", "care_u_nats")):
            lines.append([TEXTS[corpus], percent(budget), name, *(f"{cells[text][field]:.3f}" for text in texts)])
    order = list(TEXTS.values())
    lines.sort(key=lambda line: (order.index(line[0]), float(line[1][:-1])))
    return table(["calibrated on", "saved", "conversion", *(_windows(text) for text in texts)], lines)


def _choices() -> str:
    recipes = {"care-u": "CARE-U", "default": "the default"}
    rows = [row for row in read("fidelity")["rows"] if "choices" in row]
    rows.sort(key=lambda row: (row.get("kv_save", 0.0), row.get("recipe", "")))
    lines = []
    for row in rows:
        name = "original" if "recipe" not in row else f"{recipes[row['recipe']]}, {saved(row)}"
        values = (row["choices"][task][how] for task in ("ARC-E", "PIQA") for how in ("plain", "per_byte"))
        lines.append([name, *(f"{100 * value:.1f}" for value in values)])
    return table(["model", "ARC-E, sum", "ARC-E, per byte", "PIQA, sum", "PIQA, per byte"], lines)


# --- layout mla -------------------------------------------------------------------------------------------------------


ROPES = ("transmla", "transmla, FreqFold 2", "stock", "free")


def _true_mla(name: str, corpus: str) -> str:
    rows = read(name)["rows"]
    original = rows[0]["losses"]
    found = [row for row in rows[1:] if row["calibration"] == corpus]
    budgets = list(dict.fromkeys(row["budget"] for row in found))
    found.sort(key=lambda row: (budgets.index(row["budget"]), ROPES.index(row["recipe"])))
    lines = []
    for row in found:
        lost = {length: loss - original[length] for length, loss in row["losses"].items()}
        shares = []
        for baseline in ("transmla", "transmla, FreqFold 2"):
            same = [r for r in found if (r["budget"], r["recipe"]) == (row["budget"], baseline)]
            shares += [
                f"{lost[length] / (same[0]['losses'][length] - original[length]):.2f}" if same else ""
                for length in lost
            ]
        lines.append(
            [
                row["budget"].replace("50% saved, ", "50%, ").replace("75% saved, ", "75%, "),
                row["recipe"],
                *(f"{value:.3f}" for value in lost.values()),
                *shares,
                f"{row['predicted_loss_increase']:.3f}",
            ]
        )
    head = ["budget", "rope", *(f"nats, {length}" for length in original)]
    head += [f"of transmla, {length}" for length in original]
    head += [f"of transmla folded, {length}" for length in original]
    kept = [index for index, _ in enumerate([*head, "predicted"]) if any(line[index] for line in lines)]
    return table([[*head, "predicted"][i] for i in kept], [[line[i] for i in kept] for line in lines])


def _copying() -> str:
    rows = {row["key"]: row for row in read("needle")["rows"]}
    names = {"joint": "joint", "mla, free": "mla, free", "mla, stock": "mla, stock", "mla, transmla": "mla, transmla"}

    def cells(row: Row) -> list[str]:
        return [f"{row['500']:.3f}", f"{row['1500']:.3f}"]

    lines = [["original", *cells(rows["original"]), *cells(rows["original"])]]
    lines += [[shown, *cells(rows[f"c4, {key}"]), *cells(rows[f"c4 and copy, {key}"])] for key, shown in names.items()]
    return table(["model", "500, C4", "1500, C4", "500, C4 and copies", "1500, C4 and copies"], lines)


# --- healing ----------------------------------------------------------------------------------------------------------

RUNS = {
    "own": {
        "75%, 64k": "75%, 64k (the defaults)",
        "75%, lr 3e-3, 64k": "75%, 64k, rate 3e-3",
        "75%, CE 0.1, 64k": "75%, 64k, rate 3e-3, with cross entropy 0.1",
        "75%, 0.25M": "75%, 0.25M (the defaults)",
        "75%, lr 3e-3, 0.25M": "75%, 0.25M, rate 3e-3",
        "87.5%, CE 0.1, 64k": "87.5%, 64k, rate 3e-3, with cross entropy 0.1",
        "87.5%, lr 3e-3, 0.25M": "87.5%, 0.25M, rate 3e-3",
        "87.5%, attention, 0.25M": "87.5%, 0.25M, `--train attention`",
        "87.5%, CE 0.1, 0.25M": "87.5%, 0.25M, rate 3e-3, with cross entropy 0.1",
        "mla 50%, lr 3e-3, 64k": "layout mla, 50%, 64k, rate 3e-3",
    },
    "other": {
        "75%, c4 and alpaca, lr 3e-3, 0.25M": "C4 and Alpaca, rate 3e-3",
        "75%, c4 and alpaca, lr 5e-4, 0.25M": "C4 and Alpaca, rate 5e-4",
        "75%, self, lr 5e-4, 0.25M": "`self`, rate 5e-4",
        "75%, c4 and alpaca throughout, lr 1e-3, 0.25M": "C4 and Alpaca, also for calibration, rate 1e-3",
    },
    "starts": {
        "75%, lr 3e-3, 64k": "the default",
        "75%, from care, 64k": "CARE-U",
        "75%, from transmla, 64k": "TransMLA, rotary key of 32",
        "75%, from svd, 64k": "plain SVD",
    },
}


def _healing(group: str, first: str) -> str:
    rows = {row["key"]: row for row in read("heal")["rows"]}
    lines = []
    for key, shown in RUNS[group].items():
        row = rows[key]
        lines.append(
            [
                shown,
                *(f"{row[when]['loss_increase']:.3f}" for when in ("before", "after")),
                f"{100 * row['closed']:.0f}%",
                *(f"{row[when]['kl']:.3f}" for when in ("before", "after")),
                f"{100 * row['closed_kl']:.0f}%",
            ]
        )
    return table([first, "nats before", "after", "closed", "KL before", "after", "closed"], lines)


def _healing_more() -> str:
    rows = {row["key"]: row for row in read("heal")["rows"]}
    lines = []
    for key in dict.fromkeys(key for group in RUNS.values() for key in group):
        row = rows[key]
        lines.append(
            [
                key,
                *(f"{row[when]['perplexity']:.2f}" for when in ("before", "after")),
                *(f"{row[when]['top1_agreement']:.3f}" for when in ("before", "after")),
                f"{row['tokens_per_second']:.0f}",
            ]
        )
    return table(
        ["run", "perplexity before", "after", "agreement before", "after", "tokens a second"],
        lines,
    )


# --- cost -------------------------------------------------------------------------------------------------------------


def _conversion_cost() -> str:
    found = read("conversion_cost")
    shown = {
        "forward-only": "`--method care`, 50%",
        "default, 50%": "the default, 50% (with the backward pass)",
        "default, 75% (with refit)": "the default, 75% (with the backward pass and the refit of 8192 tokens)",
    }
    return table(
        ["conversion", "seconds", "times the first"],
        [
            [shown[key], f"{found['seconds'][key][0]:.1f}", f"{found['ratio_to_forward_only'][key]:.2f}"]
            for key in shown
        ],
    )


def _calibration_cost() -> str:
    found = read("calibration_cost")
    bare, calibrate = found["seconds"]["bare"], found["seconds"]["calibrate"]
    rounds = ["beside other jobs", "undisturbed"]
    return table(
        ["round", "bare passes, s", "calibration, s", "ratio"],
        [[name, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}"] for name, a, b in zip(rounds, bare, calibrate, strict=True)],
    )


# --- beside quantized caches, and speed ---------------------------------------------------------------------------------

QUANTIZED = {
    "fp8": "fp8",
    "int8": "int8, groups of 64",
    "int4": "int4, groups of 64",
    "int3": "int3, groups of 64",
    "int2": "int2, groups of 64",
    "int4, keys by channel": "int4, keys by channel (KIVI)",
    "int2, keys by channel": "int2, keys by channel (KIVI)",
}
LAYOUTS = {"original": "the original", "joint": "`joint`", "split": "`split`", "mla": "`mla`, rotary key of 64"}


def _quantized() -> str:
    lines = [
        [
            QUANTIZED[row["cache"]],
            f"{row['bits']:g}",
            f"{100 * (1 - row['bits'] / 16):.0f}%",
            f"{row['perplexity']:.2f}",
            f"{row['loss_increase']:.4f}",
            f"{row['kl']:.4f}",
            f"{100 * row['top1_agreement']:.1f}%",
        ]
        for row in read("quantized_cache")["rows"]
    ]
    return table(["cache", "bits", "saved", "perplexity", "nats lost", "KL", "agreement"], lines)


def _limits() -> str:
    kept = ("fp8", "int4, keys by channel", "int4", "int3")
    found = [
        (1 - row["bits"] / 16, QUANTIZED[row["cache"]], row["loss_increase"])
        for row in read("quantized_cache")["rows"]
        if row["cache"] in kept
    ]
    losses = {row["key"]: row["losses"]["wikitext2 512"] for row in read("fidelity")["rows"]}
    for budget in (0.5, 0.75, 0.875):
        lost = losses[f"wikitext2 42 {budget} default"] - losses["original"]
        found.append((budget, "**care-mla, the default**", lost))
    healed = {row["key"]: row["after"]["loss_increase"] for row in read("heal")["rows"]}
    found.append((0.75, "**care-mla, healed with 0.25M tokens**", healed["75%, 0.25M"]))
    return table(
        ["cache", "saved", "nats lost"],
        [[name, f"{100 * share:.3g}%", f"{lost:.3f}"] for share, name, lost in sorted(found)],
    )


def _decoding() -> str:
    rows = read("decoding")["rows"]
    contexts = list(rows[0]["milliseconds"])
    lines = [[LAYOUTS[row["model"]], *(f"{row['milliseconds'][c]:.0f} ms" for c in contexts)] for row in rows]
    return table(["model", *(f"{context} tokens in the cache" for context in contexts)], lines)


def _layouts() -> str:
    speed = {row["model"]: f"{row['milliseconds']['2048']:.0f} ms" for row in read("decoding")["rows"]}
    losses = {row["key"]: row["losses"]["wikitext2 512"] for row in read("fidelity")["rows"]}
    mla = {row["key"]: row["losses"]["512"] for row in read("true_mla")["rows"]}
    joint = losses["wikitext2 42 0.5 default"] - losses["original"]
    stock = mla["wikitext2, 50% saved, rotary key of 64, stock"] - mla["original"]
    return table(
        ["layout", "nats lost at half the cache", "one decoded token", "loads in"],
        [
            ["the original", "0", speed["original"], "every engine"],
            ["`joint` (the default)", f"{joint:.3f}", speed["joint"], "Python, with care-mla"],
            ["`split` (as in the CARE paper)", "more than `joint`", speed["split"], "Python, with care-mla"],
            [
                "`mla` with `--rope stock`",
                f"{stock:.3f}",
                speed["mla"],
                "Python, with care-mla; exported: transformers and vLLM",
            ],
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "one-shot-tokens": lambda: _one_shot("tokens"),
    "one-shot-raw": lambda: _one_shot("raw"),
    "fidelity-c4": lambda: _fractions("c4"),
    "fidelity-wikitext2": lambda: _fractions("wikitext2"),
    "fidelity-alpaca": lambda: _fractions("alpaca"),
    "fidelity-nats": _nats,
    "choices": _choices,
    "true-mla-wikitext2": lambda: _true_mla("true_mla", "wikitext2"),
    "true-mla-c4": lambda: _true_mla("true_mla", "c4"),
    "true-mla-8192": lambda: _true_mla("true_mla_8192", "wikitext2"),
    "copying": _copying,
    "healing-own": lambda: _healing("own", "saved, tokens, settings"),
    "healing-other": lambda: _healing("other", "healed on"),
    "healing-starts": lambda: _healing("starts", "conversion"),
    "healing-more": _healing_more,
    "conversion-cost": _conversion_cost,
    "calibration-cost": _calibration_cost,
    "quantized-caches": _quantized,
    "limits": _limits,
    "decoding": _decoding,
    "layouts": _layouts,
}


def outdated() -> Iterator[Path]:
    """Pages whose tables are not what the results say."""
    yield from (page for page in pages() if render(_text(page)) != _text(page))


if __name__ == "__main__":
    for page in list(outdated()):
        page.write_text(render(_text(page)), encoding="utf-8")
        print(page.relative_to(ROOT))
