"""Model families, one frozen spec a file, and the registry that maps a model_type to its spec."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from care_mla.errors import UnsupportedModelError
from care_mla.families.gemma2 import GEMMA2
from care_mla.families.gemma3 import GEMMA3
from care_mla.families.gpt_oss import GPT_OSS
from care_mla.families.granite import GRANITE
from care_mla.families.llama import LLAMA
from care_mla.families.mistral import MISTRAL
from care_mla.families.mixtral import MIXTRAL
from care_mla.families.olmo2 import OLMO2
from care_mla.families.phi3 import PHI3
from care_mla.families.qwen2 import QWEN2
from care_mla.families.qwen2_moe import QWEN2_MOE
from care_mla.families.qwen3 import QWEN3
from care_mla.families.qwen3_moe import QWEN3_MOE
from care_mla.families.smollm3 import SMOLLM3
from care_mla.families.spec import FamilySpec
from care_mla.families.starcoder2 import STARCODER2

_REGISTRY: dict[str, FamilySpec] = {}


def register_family(spec: FamilySpec) -> None:
    """Make a family known under its model_type; a later registration replaces an earlier one."""
    _REGISTRY[spec.model_type] = spec


def _register_installed() -> None:
    """Families of other installed packages: entry points of the group care_mla.families, each a `FamilySpec`."""
    for entry in entry_points(group="care_mla.families"):
        spec: FamilySpec = entry.load()
        _REGISTRY.setdefault(spec.model_type, spec)


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
        _register_installed()
    if model_type not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        raise UnsupportedModelError(
            f"architecture {config.get('architectures') or '?'} (model_type {model_type!r}) has no family spec; known: {known}. "
            "A spec says where its q, k, v projections are and what surrounds them; docs/families.md shows how to register one in ten lines"
        )
    spec = _REGISTRY[model_type]
    spec.check_config(config)
    return spec


BUILT_IN = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    GRANITE,
    SMOLLM3,
    GPT_OSS,
    STARCODER2,
)
for _spec in BUILT_IN:
    register_family(_spec)

__all__ = ["BUILT_IN", "FamilySpec", "get_family", "register_family"]
