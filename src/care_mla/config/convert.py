"""Settings of `care convert`: the recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from care_mla.config.base import MLA_PANEL, RANK_PANEL, RECIPE_PANEL, Option, Settings
from care_mla.config.dtypes import DType
from care_mla.config.policy import EXPONENT, LOW_BUDGET_EXPONENT, LOW_BUDGET_FROM
from care_mla.names import ALLOCATORS, BASELINES, METHODS, Layout, QkNorm, RopeMode

_LOW = f"{100 * LOW_BUDGET_FROM:g}% saving"


class Recipe(Settings):
    """How the weights are converted. One of `kv_save`, `rank`, `cache_elements` is the budget.

    Attributes:
        ranks, fisher_exponent, refit: None leaves them to the budget, see `config.policy`.
        ranks: allocator, a name of `ranks.ALLOCATORS`.
        shrinkage, fisher_exponent, fisher_shrinkage: see `methods.Weighting`.
        centre: whether method fisher may give means back as biases; a target without biases needs False.
        rope: which pairs stay rotary in layout mla, see `rope.select`.
        freq_fold: adjacent frequencies that rope stock and transmla treat as one (TransMLA's FreqFold); None is 1, for rope
            stock as many as share a rotary pair and at least 2, unless every pair is kept.
        qk_rope_head_dim: width of the shared rotary key in layout mla; None: of least predicted loss, or the head's own width
            where the method does not predict.
        q_lora_rank: rank of the queries in layout mla, see `conversion.queries`; None: exact.
        qk_norm: how layout mla keeps the norms of queries and keys: exact, with a cached scale a kv head, or linear, see
            `conversion.linear_norms`.
        context: positions that attention must span when rotations are dropped, layout mla.
        refit: whether output projections are refitted layer by layer (`calibration.Propagation`).
        refit_tokens: calibration tokens that the refit reads.
        refit_ridge: see `linalg.ridge_refit`.
        dtype: of the written factors; "auto" is the source's.
    """

    kv_save: Annotated[
        float | None,
        Option(
            "Share of the cache to save, e.g. 0.5.",
            default="this, --rank or --cache-elements is needed",
            also=("save", "compression", "compression-ratio", "ratio", "kv-ratio", "budget", "kv-cache-ratio"),
        ),
    ] = None
    layout: Annotated[
        Layout,
        Option(
            "joint: one latent a layer, RoPE kept whole. split: one for keys, one for values. mla: one latent and a shared rotary "
            "key, as DeepSeek; can be exported to stock classes.",
        ),
    ] = "joint"
    rank: Annotated[
        int | None,
        Option(
            "The paper's r, for K and for V; a joint latent gets 2r.", RANK_PANEL, also=("kv-lora-rank", "r", "kv-rank")
        ),
    ] = None
    cache_elements: Annotated[int | None, Option("Cached elements per token, all layers.", RANK_PANEL)] = None
    ranks: Annotated[
        str | None,
        Option(
            "How layers share the budget.",
            RANK_PANEL,
            default="fisher for method fisher, else uniform",
            choices=ALLOCATORS,
            also=("allocator", "rank-allocation", "allocation"),
        ),
    ] = None
    min_rank: Annotated[
        int | None, Option("Smallest rank of a latent.", RANK_PANEL, default="half of an equal share")
    ] = None
    max_rank: Annotated[int | None, Option("Largest rank of a latent.", RANK_PANEL, default="twice an equal share")] = (
        None
    )
    rank_multiple: Annotated[
        int,
        Option("Ranks are multiples of this.", RANK_PANEL, also=("rank-step", "round-to", "rank-align")),
        Field(ge=1),
    ] = 1
    method: Annotated[
        str,
        Option(
            "Metric of the factorization: fisher weighs errors by what the loss notices, care is the paper's, the others are "
            "baselines.",
            RECIPE_PANEL,
            choices=(*METHODS, *BASELINES),
        ),
    ] = "fisher"
    shrinkage: Annotated[
        float,
        Option("Share of isotropic noise mixed into C.", RECIPE_PANEL, also=("damping", "percdamp", "damp-percent")),
        Field(ge=0.0, le=1.0),
    ] = 0.01
    fisher_exponent: Annotated[
        float | None,
        Option(
            "p of the tempered Fisher metric G^p.",
            RECIPE_PANEL,
            default=f"{EXPONENT}; {LOW_BUDGET_EXPONENT} from {_LOW}",
        ),
        Field(ge=0.0, le=1.0),
    ] = None
    fisher_shrinkage: Annotated[
        float, Option("Share of isotropic noise mixed into G.", RECIPE_PANEL), Field(ge=0.0, le=1.0)
    ] = 0.02
    centre: Annotated[
        bool,
        Option("Give means back as biases, or keep the source's biases only.", RECIPE_PANEL, also=("center",)),
    ] = True
    refit: Annotated[
        bool | None,
        Option(
            "Refit output projections to the original's activations.",
            RECIPE_PANEL,
            default=f"method fisher from {_LOW}, except layout mla",
        ),
    ] = None
    refit_tokens: Annotated[int, Option("Calibration tokens the refit reads.", RECIPE_PANEL), Field(ge=1)] = 8192
    refit_ridge: Annotated[float, Option("Pull toward the source's weights.", RECIPE_PANEL), Field(gt=0.0)] = 0.1
    dtype: Annotated[
        DType,
        Option(
            "Of the written weights: float32, bfloat16, float16; auto: the source's.",
            RECIPE_PANEL,
            metavar="DTYPE",
            also=("torch-dtype", "outtype"),
        ),
    ] = "auto"
    rope: Annotated[
        RopeMode,
        Option(
            "Which pairs of dimensions stay rotary: free choice, as stock classes have them, or as TransMLA.", MLA_PANEL
        ),
    ] = "free"
    qk_rope_head_dim: Annotated[
        int | None,
        Option(
            "Width of the shared rotary key.",
            MLA_PANEL,
            default="of least predicted loss",
            also=("rope-dim", "rope-head-dim", "qk-mqa-dim"),
        ),
        Field(ge=2, multiple_of=2),
    ] = None
    freq_fold: Annotated[
        int | None,
        Option(
            "With --rope stock or transmla: adjacent frequencies treated as one.",
            MLA_PANEL,
            default="1, stock: at least 2",
        ),
        Field(ge=1),
    ] = None
    context: Annotated[
        int,
        Option("Positions that attention must span.", MLA_PANEL, also=("context-length", "ctx", "max-model-len")),
        Field(ge=2),
    ] = 8192
    q_lora_rank: Annotated[
        int | None, Option("Rank of the queries.", MLA_PANEL, default="exact queries"), Field(ge=1)
    ] = None
    qk_norm: Annotated[
        QkNorm,
        Option(
            "exact: with a cached scale a kv head. linear: a regression that stock classes can hold.",
            MLA_PANEL,
        ),
    ] = "exact"
