"""What `--q-lora-rank` costs beside layout mla at 50% saved.

    python benchmarks/query_rank.py --model build/smollm2-135m --data DATA --work build/query_rank

Calibrated on 128 x 256 tokens of C4, seed 42; a rotary key of 64; perplexity of 8 windows of 512 tokens of WikiText-2 validation.
What is finished is kept in --work.
"""

from __future__ import annotations

from pathlib import Path

from fidelity import Rows, mean_loss, parser_of, split_texts

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.evaluation import evaluation_windows
from care_mla.text import load_text, load_tokenizer

RECIPE = {"layout": "mla", "kv_save": 0.5, "qk_rope_head_dim": 64}
RANKS = (None, 576, 384, 288, 192)


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    quiet_libraries()
    calibration, _ = split_texts(arguments.data, arguments.work / "text")
    stats = arguments.work / "stats"
    if not stats.is_dir():
        care_mla.calibrate(arguments.model, stats, calibration=calibration["c4"], seed=42, fisher=True, inputs=True)
    text = load_text(str(arguments.data / "wikitext2/valid.tokens.txt"))
    windows = evaluation_windows(load_tokenizer(Path(arguments.model)), text, seqlen=512, windows=8)
    rows = Rows(arguments.work / "rows.jsonl")
    if "original" not in rows.done:
        rows.add("original", {"nats": mean_loss(care_mla.load(arguments.model), windows)})
    for rank in RANKS:
        if str(rank) not in rows.done:
            out = arguments.work / "converted"
            manifest = care_mla.convert(
                arguments.model, out, stats=stats, overwrite=True, q_lora_rank=rank, rope="free", **RECIPE
            )
            errors = [layer["relative_error"].get("q", 0.0) for layer in manifest["layers"]]
            row = {"nats": mean_loss(care_mla.load(out), windows), "query_error": sum(errors) / len(errors)}
            rows.add(str(rank), row)
    print("| rank of the queries | nats lost | relative error of queries |\n|-|-|-|")
    for rank in RANKS:
        row = rows.done[str(rank)]
        lost = row["nats"] - rows.done["original"]["nats"]
        print(f"| {rank or 'exact'} | {lost:.3f} | {row['query_error']:.4f} |")


if __name__ == "__main__":
    main()
