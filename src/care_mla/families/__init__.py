"""Model families, one frozen spec a file, and the registry that maps a model_type to its spec."""

from collections.abc import Mapping
from typing import Any

from care_mla.errors import UnsupportedModelError
from care_mla.families.llama import LLAMA
from care_mla.families.mistral import MISTRAL
from care_mla.families.qwen2 import QWEN2
from care_mla.families.qwen3 import QWEN3
from care_mla.families.spec import FamilySpec

_REGISTRY: dict[str, FamilySpec] = {}


def register_family(spec: FamilySpec) -> None:
    """Make a family known under its model_type; a later registration replaces an earlier one."""
    _REGISTRY[spec.model_type] = spec


def get_family(config: Mapping[str, Any]) -> FamilySpec:
    """The spec for a config.json.

    Raises:
        UnsupportedModelError: no spec for its model_type, or a feature of it that cannot be expressed.
    """
    model_type = config.get("model_type")
    if model_type == "care_mla":
        raise UnsupportedModelError(
            "this checkpoint is already converted (model_type care_mla); convert its source instead"
        )
    if model_type not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        raise UnsupportedModelError(
            f"architecture {config.get('architectures') or '?'} (model_type {model_type!r}) has no family spec; known: {known}. "
            "A spec says where its q, k, v projections are and what surrounds them: care_mla.register_family(FamilySpec(...))"
        )
    spec = _REGISTRY[model_type]
    spec.check_config(config)
    return spec


for _spec in (LLAMA, MISTRAL, QWEN2, QWEN3):
    register_family(_spec)

__all__ = ["FamilySpec", "get_family", "register_family"]
