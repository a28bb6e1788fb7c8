"""What config.json alone tells of a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from care_mla.checkpoint import resolve_source
from care_mla.families import get_family
from care_mla.families.ordinary import is_ordinary
from care_mla.files import read_json
from care_mla.geometry import Geometry
from care_mla.layouts import JOINT, MLA, Layout
from care_mla.ranks import make_budget

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class BudgetRow:
    """One line of the cache table: `rank` is the paper's r (for K and for V)."""

    kv_save: float
    elements: int
    rank: float


@dataclass(frozen=True)
class Inspection:
    """What config.json alone tells of a source.

    Attributes:
        features: (feature, how this model has it, how layouts split and joint keep it, how mla does; or "no" and why).
    """

    architecture: str
    geometry: Geometry
    dtype: str
    element_bytes: int
    budgets: list[BudgetRow]
    features: list[tuple[str, str, str, str]]


def _no(feature: str, layout: Layout) -> str:
    """What a layout says of a feature that it cannot express."""
    return ": ".join(["no", layout.refuses.get(feature, "")]).removesuffix(": ")


def inspect(source: str | Path, budgets: Sequence[float] = (0.5, 0.75, 0.875)) -> Inspection:
    """Architecture, cache now and at the given savings, and the features that a conversion must keep.

    Raises:
        CheckpointError, UnsupportedModelError, RankError
    """
    config = read_json(resolve_source(source, config_only=True) / "config.json")
    family = get_family(config)
    geometry = family.geometry(config)
    if not is_ordinary(config, family):
        from care_mla.modeling import require_buildable

        require_buildable(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    rows = []
    for kv_save in (0.0, *budgets):
        elements = make_budget(geometry, JOINT, kv_save=kv_save).elements
        rows.append(BudgetRow(kv_save, elements, elements / (2 * geometry.num_layers)))
    return Inspection(
        architecture=", ".join(config.get("architectures") or [family.model_type]),
        geometry=geometry,
        dtype=dtype,
        element_bytes=ELEMENT_BYTES[dtype],
        budgets=rows,
        features=[
            (
                name,
                how,
                JOINT.keeps.get(name) or _no(name, JOINT),
                MLA.keeps.get(name) or _no(name, MLA),
            )
            for name, how in family.features(config).items()
        ],
    )
