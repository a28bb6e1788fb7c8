"""How a budget of the cache is named, without torch: `care inspect` needs no more."""

from __future__ import annotations

import math
from collections.abc import Mapping

from care_mla.errors import RankError
from care_mla.geometry import Geometry


def budget_elements(
    geometry: Geometry,
    *,
    num_blocks: int,
    rank: int | None = None,
    kv_save: float | None = None,
    cache_elements: int | None = None,
    beside: Mapping[str, int] | None = None,
) -> int:
    """Cached elements per token of all layers, for one of the three ways to name a budget.

    Args:
        num_blocks: latents of a layer, each of rank 1 at least.
        rank, kv_save, cache_elements, beside: see `ranks.make_budget`.

    Raises:
        RankError: none or several given, or out of range.
    """
    full, layers = geometry.cache_elements_per_token, geometry.num_layers
    given = {"rank": rank, "kv_save": kv_save, "cache_elements": cache_elements}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise RankError(f"give exactly one of --rank, --kv-save, --cache-elements (got {', '.join(named) or 'none'})")
    if rank is not None:
        if not 1 <= rank <= geometry.kv_width:
            raise RankError(
                f"--rank {rank} is outside 1..{geometry.kv_width} (KV parity: num_kv_heads x head_dim = {geometry.kv_width})"
            )
        elements = 2 * rank * layers
    elif kv_save is not None:
        if not (math.isfinite(kv_save) and 0.0 <= kv_save < 1.0):
            raise RankError(f"--kv-save {kv_save} is outside [0, 1); 0.5 halves the cache")
        elements = math.floor(full * (1.0 - kv_save) + 1e-6)
    else:
        assert cache_elements is not None
        elements = cache_elements
    beside = beside or {}
    spent = layers * sum(beside.values())
    least, most = spent + num_blocks * layers, spent + full
    if not least <= elements <= most:
        extra = ", ".join(f"{name} {width}" for name, width in beside.items())
        raise RankError(
            f"a budget of {elements} cached elements per token is outside {least}..{most} ({layers} layers, rank 1 to KV parity"
            + (f" beside {extra} in each)" if beside else ")")
        )
    return elements
