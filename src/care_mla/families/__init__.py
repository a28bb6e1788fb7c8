"""Model families, one frozen spec a file, and the registry that maps a model_type to its spec."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from care_mla.errors import UnsupportedModelError
from care_mla.families.entries import check_identity
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
from care_mla.families.refusals import why_not
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
    """The spec for a config.json, whose entries are checked.

    Raises:
        CheckpointError: an entry that cannot be read.
        UnsupportedModelError: no spec for its model_type, or a feature of it that cannot be expressed.
    """
    check_identity(config)
    model_type = config["model_type"]
    if model_type == "care_mla":
        raise UnsupportedModelError(
            "this checkpoint is already converted (model_type care_mla); convert its source instead"
        )
    if model_type not in _REGISTRY:
        _register_installed()
    if model_type not in _REGISTRY:
        raise UnsupportedModelError(_without_spec(config))
    spec = _REGISTRY[model_type]
    spec.check_config(config)
    return spec


def _without_spec(config: Mapping[str, Any]) -> str:
    """What is said of a model_type that is not registered."""
    name = f"{', '.join(config.get('architectures') or ['?'])} (model_type {config['model_type']!r})"
    if reason := why_not(config):
        return f"this {name} {reason}"
    code = "; code that comes with a checkpoint (auto_map) is never run" if config.get("auto_map") else ""
    return (
        f"architecture {name} has no family spec; known: {', '.join(sorted(_REGISTRY))}. A spec says where the q, k, v projections of a class "
        f"of transformers are and what surrounds them; docs/families.md shows how to register one in ten lines{code}"
    )


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
