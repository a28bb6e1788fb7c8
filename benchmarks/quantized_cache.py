"""What plain quantized KV caches lose on the windows on which conversions are measured: fp8, integers, and KIVI's groups.

    python benchmarks/quantized_cache.py --model build/smollm2-135m --data DATA

Nothing is converted: keys (turned, as they are cached) and values are rounded and back before attention reads them, those of the current
token included. Scales and offsets are counted in the bits. First 8 windows of 512 tokens of wikitext2/test.tokens.txt. Writes
benchmarks/results/quantized_cache.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import print as show
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.evaluation import evaluate_model, evaluation_windows
from care_mla.pipeline import versions, write_json
from care_mla.text import load_text, load_tokenizer

Rounding = Callable[[Tensor], Tensor]
SCALE_BITS = 32
"""Of a group: a scale and an offset in half precision."""


def integers(x: Tensor, bits: int, group: int, dim: int) -> Tensor:
    """x with every group of neighbours along `dim` rounded to 2^bits levels between its smallest and its largest."""
    split = x.transpose(dim, -1)
    tail = split.shape[-1] % group
    whole, rest = split[..., : split.shape[-1] - tail], split[..., split.shape[-1] - tail :]
    grouped = whole.unflatten(-1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    rounded = (((grouped - low) / step).round() * step + low).flatten(-2)
    return torch.cat([rounded, rest], dim=-1).transpose(dim, -1)


def fp8(x: Tensor) -> Tensor:
    """x as float8_e4m3, without a scale, as engines do by default."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def per_token(bits: int) -> tuple[Rounding, Rounding]:
    """Keys and values in groups of 64 along the head."""
    rounding = partial(integers, bits=bits, group=64, dim=-1)
    return rounding, rounding


def kivi(bits: int) -> tuple[Rounding, Rounding]:
    """Keys in groups of 32 tokens of a channel, values in groups of 32 along the head; without KIVI's window of recent tokens."""
    return partial(integers, bits=bits, group=32, dim=-2), partial(integers, bits=bits, group=32, dim=-1)


CACHES: dict[str, tuple[float, tuple[Rounding, Rounding]]] = {
    "fp8": (8.0, (fp8, fp8)),
    **{f"int{bits}": (bits + SCALE_BITS / 64, per_token(bits)) for bits in (8, 4, 3, 2)},
    **{f"int{bits}, keys by channel": (bits + SCALE_BITS / 32, kivi(bits)) for bits in (4, 2)},
}
"""Name -> bits of a cached element, and what happens to keys and to values."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "quantized_cache.json")
    arguments = parser.parse_args()
    quiet_libraries()
    text = load_text(str(arguments.data / "wikitext2/test.tokens.txt"))
    windows = evaluation_windows(load_tokenizer(Path(arguments.model)), text, seqlen=512, windows=8)
    reference, model = care_mla.load(arguments.model), care_mla.load(arguments.model)
    roundings: list[tuple[Rounding, Rounding]] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        keys, values = roundings[-1]
        return sdpa_attention_forward(module, query, keys(key), values(value), *args, **options)

    AttentionInterface.register("quantized_cache", attention)
    model.config._attn_implementation = "quantized_cache"
    rows = []
    for name, (bits, rounding) in CACHES.items():
        roundings.append(rounding)
        found = evaluate_model(model, windows, reference=reference)
        rows.append(
            {
                "cache": name,
                "bits": bits,
                "perplexity": found.perplexity,
                "loss_increase": found.loss_increase,
                "kl": found.kl,
                "top1_agreement": found.top1_agreement,
            }
        )
        show(rows[-1])
    write_json(
        arguments.json, {"versions": versions(), "reference_perplexity": found.reference_perplexity, "rows": rows}
    )


if __name__ == "__main__":
    main()
