"""Time and memory of calibration against the bare forward passes, in one process: forward-only (alternating), then with Fisher.

    python benchmarks/calibration_cost.py --model build/smollm2-135m --text DATA/wikitext2/valid.tokens.txt

Bare: the decoder's forward (no language-model head) over the same 128 x 256 tokens in the same batches. Writes
benchmarks/results/calibration_cost.json.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from rich import print as show

import care_mla
from care_mla.calibration import Collected, collect_fisher, collect_moments
from care_mla.cli import quiet_libraries
from care_mla.pipeline import open_source, versions, write_json
from care_mla.text import load_tokenizer, make_windows


def _peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "calibration_cost.json")
    arguments = parser.parse_args()
    quiet_libraries()
    source = open_source(arguments.model)
    windows = make_windows(arguments.text, load_tokenizer(source.directory), samples=128, seqlen=256, seed=42)
    model = care_mla.load(arguments.model)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    @torch.no_grad()
    def bare() -> None:
        for batch in windows.batches(8):
            model.get_decoder()(input_ids=batch.input_ids, use_cache=False)

    def calibrate() -> None:
        collect_moments(model, source.family, windows, Collected())

    seconds: dict[str, list[float]] = {"bare": [], "calibrate": []}
    peaks = {"loaded": _peak_gigabytes()}
    for _ in range(arguments.rounds):
        for name, work in (("bare", bare), ("calibrate", calibrate)):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
            peaks[name] = _peak_gigabytes()
    start = time.perf_counter()
    collect_fisher(model, source.family, windows, Collected())
    seconds["fisher"] = [time.perf_counter() - start]
    peaks["fisher"] = _peak_gigabytes()
    ratio = statistics.median(c / b for b, c in zip(seconds["bare"], seconds["calibrate"], strict=True))
    result = {
        "tokens": windows.num_tokens,
        "seconds": seconds,
        "median_ratio": ratio,
        "fisher_ratio": seconds["fisher"][0] / statistics.median(seconds["calibrate"]),
        "peak_gigabytes": peaks,
        "model_gigabytes": model_bytes / 1e9,
        "versions": versions(),
    }
    show(result)
    arguments.json.parent.mkdir(exist_ok=True)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
