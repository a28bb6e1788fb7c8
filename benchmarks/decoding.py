"""Time of one decoded token by layout and context, on one CPU core, through transformers' generate path of each class.

    python benchmarks/decoding.py --model build/smollm2-135m --data DATA --work build/decoding

50% saved, `--method care` on a little text: what the weights are changes no time. A cache is filled once with the first tokens of
wikitext2/test.tokens.txt, then tokens are decoded from it one at a time. Models take turns; a number is the fastest of all
their steps, since other work on the machine can only add. Writes benchmarks/results/decoding.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from fidelity import parser_of
from rich import print as show
from torch import Tensor

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.evaluation import evaluation_windows, measure_cache
from care_mla.modeling import cache_of
from care_mla.pipeline import versions, write_json
from care_mla.text import load_text, load_tokenizer

LAYOUTS: dict[str, dict[str, Any]] = {
    "joint": {"layout": "joint"},
    "split": {"layout": "split"},
    "mla": {"layout": "mla", "rope": "stock", "qk_rope_head_dim": 64},
}
CONTEXTS = (512, 2048)


@torch.no_grad()
def fastest_step(model: Any, tokens: Tensor, steps: int) -> float:
    """Seconds of the fastest of some steps that follow a prefill of all but the last of the tokens."""
    cache = cache_of(model(tokens[:, :-1], use_cache=True, logits_to_keep=1))
    best = float("inf")
    for step in range(steps):
        position = torch.tensor([[tokens.shape[1] - 1 + step]])
        start = time.perf_counter()
        model(tokens[:, -1:], past_key_values=cache, use_cache=True, position_ids=position, logits_to_keep=1)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "decoding.json")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    text = load_text(str(arguments.data / "wikitext2/test.tokens.txt"))
    tokens = evaluation_windows(load_tokenizer(Path(arguments.model)), text, seqlen=max(CONTEXTS), windows=1)
    calibration = {
        "calibration": str(arguments.data / "wikitext2/valid.tokens.txt"),
        "samples": 8,
    }
    models = {"original": care_mla.load(arguments.model)}
    for name, recipe in LAYOUTS.items():
        out = arguments.work / name
        if not out.exists():
            care_mla.convert(arguments.model, out, kv_save=0.5, method="care", calibration=calibration, **recipe)
        models[name] = care_mla.load(out)
    seconds: dict[str, dict[int, float]] = {name: {} for name in models}
    for context in CONTEXTS:
        for _ in range(arguments.rounds):
            for name, model in models.items():
                found = fastest_step(model, tokens[:, :context], arguments.steps)
                seconds[name][context] = min(found, seconds[name].get(context, found))
        show(context, {name: round(1000 * found[context], 1) for name, found in seconds.items()})
    rows = [
        {
            "model": name,
            "cache_bytes_per_token": measure_cache(model, tokens[:, :256]).bytes_per_token,
            "milliseconds": {str(context): 1000 * value for context, value in seconds[name].items()},
        }
        for name, model in models.items()
    ]
    write_json(arguments.json, {"versions": versions(), "threads": 1, "rows": rows})


if __name__ == "__main__":
    main()
