"""What config.json alone tells of a source. Neither torch nor, for ordinary configs, transformers is imported for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from care_mla.checkpoint import resolve_source
from care_mla.errors import ConfigError
from care_mla.export.engines import ENGINES, EngineVerdict, verdict
from care_mla.families import get_family
from care_mla.families.ordinary import is_ordinary
from care_mla.files import read_json
from care_mla.geometry import Geometry
from care_mla.layouts.features import MLA_KEEPS, MLA_REFUSES, WHOLE_ROPE_KEEPS
from care_mla.ranks.budget import budget_elements

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
CONTEXTS = (8192, 32768, 131072)
"""Tokens that the size of the cache is told for."""


@dataclass(frozen=True)
class BudgetRow:
    """One line of the cache table.

    Attributes:
        rank: the paper's r (for K and for V).
        cache_gib: tokens of a sequence -> cache of all sequences of the batch, GiB (2^30 bytes).
    """

    kv_save: float
    elements: int
    rank: float
    cache_gib: dict[int, float]


@dataclass(frozen=True)
class Inspection:
    """What config.json alone tells of a source.

    Attributes:
        batch: sequences that `BudgetRow.cache_gib` counts.
        features: (feature, how this model has it, how layouts split and joint keep it, how mla does; or "no" and why).
        engines: what each engine can do for it.
    """

    architecture: str
    geometry: Geometry
    dtype: str
    element_bytes: int
    batch: int
    budgets: list[BudgetRow]
    features: list[tuple[str, str, str, str]]
    engines: list[EngineVerdict]


def _said(feature: str, keeps: Mapping[str, str], refuses: Mapping[str, str]) -> str:
    """What a layout says of a feature."""
    return keeps.get(feature) or ": ".join(["no", refuses.get(feature, "")]).removesuffix(": ")


def inspect(source: str | Path, budgets: Sequence[float] = (0.5, 0.75, 0.875), *, batch: int = 1) -> Inspection:
    """Architecture, cache now and at the given savings, the features that a conversion must keep, and what engines can hold.

    Args:
        batch: sequences that share the cache.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError, RankError
    """
    if batch < 1:
        raise ConfigError(f"--batch {batch}: at least one sequence")
    config = read_json(resolve_source(source, config_only=True) / "config.json")
    family = get_family(config)
    geometry = family.geometry(config)
    if not is_ordinary(config, family):
        from care_mla.modeling import require_buildable

        require_buildable(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    features, element_bytes = family.features(config), ELEMENT_BYTES[dtype]
    rows = []
    for kv_save in (0.0, *budgets):
        elements = budget_elements(geometry, num_blocks=1, kv_save=kv_save)
        sizes = {tokens: batch * tokens * elements * element_bytes / 2**30 for tokens in CONTEXTS}
        rows.append(BudgetRow(kv_save, elements, elements / (2 * geometry.num_layers), sizes))
    return Inspection(
        architecture=", ".join(config.get("architectures") or [family.model_type]),
        geometry=geometry,
        dtype=dtype,
        element_bytes=element_bytes,
        batch=batch,
        budgets=rows,
        features=[
            (name, how, _said(name, WHOLE_ROPE_KEEPS, {}), _said(name, MLA_KEEPS, MLA_REFUSES))
            for name, how in features.items()
        ],
        engines=[verdict(engine, features, geometry, exports=family.exports, dtype=dtype) for engine in ENGINES],
    )
