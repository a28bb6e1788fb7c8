"""One layer: its truncated spectrum becomes the tensors of an attention, and the record of what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from care_mla.conversion.queries import low_rank_queries
from care_mla.conversion.spectra import Spectra
from care_mla.layouts import relative_errors, share
from care_mla.linalg import Factors
from care_mla.ranks import RankPlan
from care_mla.stats import LayerStatistics


@dataclass(frozen=True)
class ConvertedLayer:
    """An attention as it will be written.

    Attributes:
        tensors: those that are not the source's under the same name, by canonical name.
        record: what the manifest says of the layer.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def converted_layer(spectra: Spectra, plan: RankPlan, layer: int) -> ConvertedLayer:
    """Tensors and record of one layer at the ranks of a plan."""
    factors = spectra.factors(layer, plan.ranks[layer])
    record = _record(spectra, plan, layer, factors)
    queries = low_rank_queries(spectra.evidence, layer)
    if queries is not None:
        record["relative_error"]["q"] = queries.relative_error
    tensors = plan.layout.tensors(
        spectra.evidence.attention(layer),
        factors,
        spectra.contents[layer],
        spectra.means[layer],
        spectra.decision.facts.geometry,
        queries=None if queries is None else queries.factors,
    )
    return ConvertedLayer(tensors, record)


def layer_records(spectra: Spectra, plan: RankPlan) -> list[dict[str, Any]]:
    """What the manifest would say of every layer, without making tensors."""
    layers = range(len(plan.ranks))
    return [_record(spectra, plan, layer, spectra.factors(layer, plan.ranks[layer])) for layer in layers]


def predicted_by_cause(spectra: Spectra, plan: RankPlan) -> dict[str, float]:
    """Predicted losses of all layers, nats per token, by the causes of `Layout.predicted_losses`; of statistics with gradients."""
    total: dict[str, float] = {}
    for layer, ranks in enumerate(plan.ranks):
        collected, _ = spectra.evidence.latent_outputs(layer, with_fisher=True)
        for cause, lost in _losses(spectra, layer, spectra.factors(layer, ranks), collected).items():
            total[cause] = total.get(cause, 0.0) + lost
    return total


def predicted_total(records: Sequence[dict[str, Any]]) -> float | None:
    """Predicted loss increase of a whole conversion, nats per token; None where nothing predicts it."""
    parts = [record["predicted_loss_increase"] for record in records]
    return None if None in parts else sum(parts)


def _losses(spectra: Spectra, layer: int, factors: Sequence[Factors], collected: LayerStatistics) -> dict[str, float]:
    decision = spectra.decision
    return decision.layout.predicted_losses(
        factors, collected, spectra.contents[layer], spectra.means[layer], decision.facts, decision.options
    )


def _record(spectra: Spectra, plan: RankPlan, layer: int, factors: Sequence[Factors]) -> dict[str, Any]:
    decision, evidence = spectra.decision, spectra.evidence
    ranks, mean, content = plan.ranks[layer], spectra.means[layer], spectra.contents[layer]
    dropped = [(block[layer], rank) for block, rank in zip(spectra.energies, ranks, strict=True)]
    collected, _ = evidence.latent_outputs(layer, with_fisher=evidence.has_fisher)
    k_error, v_error = relative_errors(
        factors,
        collected.moments.second_moment,
        rows=plan.layout.rows(decision.facts.geometry.kv_width),
        output_mean=collected.moments.mean,
        centre=mean,
        content=content.map,
    )
    losses = None if collected.fisher is None else _losses(spectra, layer, factors, collected)
    return {
        "ranks": list(ranks),
        "residual": [float(energies[rank:].sum()) for energies, rank in dropped],
        "kept_energy": [1.0 - share(energies[rank:], energies) for energies, rank in dropped],
        "relative_error": {"k": k_error, "v": v_error},
        "predicted_loss_increase": None if losses is None else sum(losses.values()),
        **{f"predicted_{cause}_loss": lost for cause, lost in (losses or {}).items() if cause != "latent"},
        **evidence.record(layer),
    }
