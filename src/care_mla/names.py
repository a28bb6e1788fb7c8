"""Names that users type and files hold, where no library is needed to know them. Tests keep them equal to the tables they name."""

from __future__ import annotations

from typing import Literal

Layout = Literal["joint", "split", "mla"]
"""split: one latent for keys and one for values (the paper). joint: one latent for both. mla: one latent for position-free keys
and values, and a rotary key shared by all heads (DeepSeek)."""

RopeMode = Literal["free", "stock", "transmla"]
"""How layout mla chooses the pairs of dimensions that stay rotary, see `rope.select`."""

QkNorm = Literal["exact", "linear"]
"""How layout mla keeps the norms of queries and keys: with a cached scale a kv head, or as a regression that stock classes hold."""

Trained = Literal["kv", "attention", "all"]
"""Which weights healing trains: the factors of keys and values, whole attentions, or everything."""

METHODS = ("fisher", "care")
"""Methods (`methods.METHODS`) that a conversion may want."""

BASELINES = ("svd", "asvd", "svd_llm", "care_c", "balanced_pca")
"""Methods of other papers, for comparison."""

ALLOCATORS = ("fisher", "energy", "uniform", "care")
"""How a budget is spent on layers (`ranks.ALLOCATORS`)."""

EXPORT_TARGETS = ("deepseek-v3",)
"""Stock classes that an export can be (`export`)."""

ENGINES = ("transformers", "vllm")
"""Engines that an export can be for."""
