"""What a converted layer caches, one file a layout; see `layouts.base`."""

from care_mla.layouts.base import AttentionWeights, DenseProjections, LatentContent, Layout, Options, SourceFacts
from care_mla.layouts.joint import JOINT
from care_mla.layouts.losses import predicted_loss_increase, reconstruction_error, relative_errors, share
from care_mla.layouts.mla import MLA
from care_mla.layouts.registry import LAYOUTS, get_layout, layouts_with, lost_features, require_expressible
from care_mla.layouts.split import SPLIT
from care_mla.layouts.whole_rope import dense_projections

__all__ = [
    "JOINT",
    "LAYOUTS",
    "MLA",
    "SPLIT",
    "AttentionWeights",
    "DenseProjections",
    "LatentContent",
    "Layout",
    "Options",
    "SourceFacts",
    "dense_projections",
    "get_layout",
    "layouts_with",
    "lost_features",
    "predicted_loss_increase",
    "reconstruction_error",
    "relative_errors",
    "require_expressible",
    "share",
]
