"""Wall time of whole conversions, calibration included: the default (Fisher) against a forward-only one, alternating.

    python benchmarks/conversion_cost.py --model build/smollm2-135m --text DATA/wikitext2/valid.tokens.txt

Each is `care convert SOURCE --kv-save X --calibration TEXT` with 128 x 256 tokens; forward-only adds `--method care`. Writes
benchmarks/results/conversion_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich import print as show

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.pipeline import versions, write_json

CONVERSIONS: dict[str, dict[str, Any]] = {
    "forward-only": {"method": "care", "kv_save": 0.5},
    "default, 50%": {"kv_save": 0.5},
    "default, 75% (with refit)": {"kv_save": 0.75},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "conversion_cost.json")
    arguments = parser.parse_args()
    quiet_libraries()
    seconds: dict[str, list[float]] = {name: [] for name in CONVERSIONS}
    with tempfile.TemporaryDirectory() as work:
        for _ in range(arguments.rounds):
            for name, recipe in CONVERSIONS.items():
                start = time.perf_counter()
                care_mla.convert(
                    arguments.model,
                    Path(work) / "converted",
                    calibration={"calibration": arguments.text},
                    overwrite=True,
                    **recipe,
                )
                seconds[name].append(time.perf_counter() - start)
                show(name, seconds[name][-1])
    base = seconds["forward-only"]
    ratios = {
        name: statistics.median(t / b for t, b in zip(times, base, strict=True)) for name, times in seconds.items()
    }
    result = {"tokens": 128 * 256, "seconds": seconds, "ratio_to_forward_only": ratios, "versions": versions()}
    show(result)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
