"""What a converted layer caches, one file a layout; see `layouts.base`. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from care_mla.lazy import on_first_use

if TYPE_CHECKING:
    from care_mla.layouts.base import AttentionWeights, DenseProjections, LatentContent, Layout, Options, SourceFacts
    from care_mla.layouts.joint import JOINT
    from care_mla.layouts.losses import predicted_loss_increase, reconstruction_error, relative_errors, share
    from care_mla.layouts.mla import MLA
    from care_mla.layouts.registry import LAYOUTS, get_layout, layouts_with, lost_features, require_expressible
    from care_mla.layouts.split import SPLIT
    from care_mla.layouts.whole_rope import dense_projections

on_first_use(
    __name__,
    {
        "care_mla.layouts.base": (
            "AttentionWeights",
            "DenseProjections",
            "LatentContent",
            "Layout",
            "Options",
            "SourceFacts",
        ),
        "care_mla.layouts.joint": ("JOINT",),
        "care_mla.layouts.losses": (
            "predicted_loss_increase",
            "reconstruction_error",
            "relative_errors",
            "share",
        ),
        "care_mla.layouts.mla": ("MLA",),
        "care_mla.layouts.registry": (
            "LAYOUTS",
            "get_layout",
            "layouts_with",
            "lost_features",
            "require_expressible",
        ),
        "care_mla.layouts.split": ("SPLIT",),
        "care_mla.layouts.whole_rope": ("dense_projections",),
    },
)
