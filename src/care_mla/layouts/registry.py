"""The layouts by name. A new one is a file in this room and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from care_mla.errors import ConfigError, UnsupportedModelError
from care_mla.layouts.base import Layout
from care_mla.layouts.joint import JOINT
from care_mla.layouts.mla import MLA
from care_mla.layouts.split import SPLIT

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (SPLIT, JOINT, MLA)}


def get_layout(name: str) -> Layout:
    """A layout by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"unknown --layout {name!r}; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def layouts_with(option: str) -> str:
    """Names of the layouts that read an option of the recipe."""
    return " or ".join(layout.name for layout in LAYOUTS.values() if option in layout.options)


def lost_features(features: Mapping[str, str], layout: Layout) -> list[str]:
    """Features of a source that a layout would drop."""
    return [feature for feature in features if feature not in layout.keeps]


def require_expressible(features: Mapping[str, str], layout: Layout, model_type: str) -> None:
    """Refuse a source with a feature that a layout would drop.

    Args:
        features: of the source, see `FamilySpec.features`.

    Raises:
        UnsupportedModelError: the sentence names the layouts that keep them.
    """
    if lost := lost_features(features, layout):
        able = [other.name for other in LAYOUTS.values() if set(lost) <= set(other.keeps)]
        hint = f"; choose --layout {' or '.join(able)}" if able else ""
        because = "; ".join(layout.refuses[feature] for feature in lost if feature in layout.refuses)
        raise UnsupportedModelError(
            f"this {model_type} model has {', '.join(lost)}, which layout {layout.name} cannot express{hint}"
            + (f" ({because})" if because else "")
        )
