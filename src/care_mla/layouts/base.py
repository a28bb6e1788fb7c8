"""What a layout is: which latents a layer caches, what they carry, and the tensors and config entries that say so.

A layout is one file with one subclass of `Layout`, listed in `layouts.registry`. Nothing outside of this room compares a layout's
name: whoever needs to know something of a layout asks it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from care_mla.families.entries import malformed
from care_mla.geometry import Geometry
from care_mla.layouts.losses import predicted_loss_increase
from care_mla.linalg import Factors
from care_mla.methods import Metric
from care_mla.stats import LayerStatistics

Options = Mapping[str, Any]
"""Fields of a recipe by name: those in `Layout.options`."""


@dataclass(frozen=True)
class SourceFacts:
    """What layouts ask of a source, known from its config.json.

    Attributes:
        geometry: of its attention.
        features: feature -> how this model has it, see `FamilySpec.features`.
        frequencies: gives the angles per position [F] of its rotary pairs.
    """

    geometry: Geometry
    features: Mapping[str, str]
    frequencies: Callable[[], Tensor]


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of a source attention in torch orientation, float64.

    Attributes:
        q, k, v: [n_h d, D], [n, D], [n, D]; o: [D, n_h d]; biases or None.
        q_norm, k_norm: [d] weights of the norms of queries and keys, None without QK-norm.
        k_size: [n], rms of each key's head on average over calibration text; None: ones.
        fused: whether q, k and v are rows of one stored matrix.
    """

    q: Float[Tensor, "nq D"]
    k: Float[Tensor, "n D"]
    v: Float[Tensor, "n D"]
    o: Float[Tensor, "D nq"]
    q_bias: Float[Tensor, "nq"] | None = None
    k_bias: Float[Tensor, "n"] | None = None
    v_bias: Float[Tensor, "n"] | None = None
    o_bias: Float[Tensor, "D"] | None = None
    q_norm: Float[Tensor, "_"] | None = None
    k_norm: Float[Tensor, "_"] | None = None
    k_size: Float[Tensor, "n"] | None = None
    fused: bool = False

    @property
    def keys_and_values(self) -> Float[Tensor, "m D"]:
        """[W_K ; W_V], m = 2n."""
        return torch.cat([self.k, self.v])

    def key_scale(self) -> Float[Tensor, "n"]:
        """diag of S: what the keys' norm multiplies them by on average; ones without QK-norm."""
        n = len(self.k)
        weight = self.k.new_ones(n) if self.k_norm is None else self.k_norm.repeat(n // len(self.k_norm))
        return weight if self.k_size is None else weight / self.k_size


@dataclass(frozen=True)
class LatentContent:
    """What the latents of one layer carry of its outputs y = [keys ; values].

    Attributes:
        map: B [m, m], of which they carry B y; None: all of y.
    """

    map: Float[Tensor, "m m"] | None = None


@dataclass(frozen=True)
class DenseProjections:
    """Key and value projections of a converted layer written out: what the latents amount to.

    Attributes:
        k, v: [n, D].
        k_bias, v_bias: [n], None where there is none.
    """

    k: Float[Tensor, "n D"]
    v: Float[Tensor, "n D"]
    k_bias: Float[Tensor, "n"] | None
    v_bias: Float[Tensor, "n"] | None


class Layout(ABC):
    """What a layer caches. One object a layout, without state.

    Attributes:
        name: as on the command line and in config.json.
        blocks: the latents of a layer.
        keeps: feature of a source (`FamilySpec.features`) -> how it is kept. One that is not here cannot be converted.
        refuses: feature that cannot be kept -> why.
        options: fields of a recipe that this layout reads and not every layout does.
        attention: "module:class" of the attention that runs it.
        caches_positions: whether the cache holds the position of every token, because keys are turned when they are read.
        exports: stock classes that a model of this layout can be exported to.
    """

    name: ClassVar[str]
    blocks: ClassVar[tuple[str, ...]]
    keeps: ClassVar[Mapping[str, str]]
    refuses: ClassVar[Mapping[str, str]]
    options: ClassVar[frozenset[str]]
    attention: ClassVar[str]
    caches_positions: ClassVar[bool]
    exports: ClassVar[tuple[str, ...]] = ()

    # What is decided before weights are read.

    def candidates(self, facts: SourceFacts, options: Options, *, predicts_loss: bool) -> list[dict[str, Any]]:
        """Values for the options that were left open; several where the predicted loss is to choose.

        Args:
            predicts_loss: whether the method predicts losses; otherwise there is one candidate.
        """
        return [{}]

    def candidate_name(self, options: Options) -> str:
        """How records name a candidate."""
        return self.name

    def price(self, losses: Mapping[str, float]) -> float:
        """What candidates are compared by.

        Args:
            losses: of all layers, by the names of `predicted_losses`.
        """
        return sum(losses.values())

    def require_options(self, facts: SourceFacts, options: Options) -> None:  # noqa: B027 - most need none
        """Refuse options that cannot work for a source.

        Raises:
            ConfigError, RankError
        """

    def acting(self, facts: SourceFacts, options: Options) -> frozenset[str]:
        """Fields of the recipe that changed something: of `options`, and those of the method that this layout reads too.

        Args:
            options: decided.
        """
        return self.options

    def cached_beside(self, facts: SourceFacts, options: Options) -> dict[str, int]:
        """Name -> elements that every layer caches for a token beside its latents."""
        return {}

    def normalizes_outside(self, facts: SourceFacts, options: Options) -> bool:
        """Whether keys are normalized by scales that are cached beside the latents, which then carry keys of that size."""
        return False

    # Latents.

    @abstractmethod
    def rows(self, kv_width: int) -> tuple[slice, ...]:
        """Rows of y = [keys ; values] that each block covers."""

    def block_width(self, geometry: Geometry) -> int:
        """Largest rank of one latent."""
        first = self.rows(geometry.kv_width)[0]
        return int(first.stop - first.start)

    # One layer.

    def content(self, metric: Metric, facts: SourceFacts, options: Options) -> LatentContent:
        """What the latents of a layer are to carry.

        Args:
            metric: of all of its outputs.
        """
        return LatentContent()

    def predicted_losses(
        self,
        factors: Sequence[Factors],
        statistics: LayerStatistics,
        content: LatentContent,
        mean: Tensor | None,
        facts: SourceFacts,
        options: Options,
    ) -> dict[str, float]:
        """Loss increase of converting this layer alone, in nats per token, by cause; "latent" is what truncation costs.

        Args:
            statistics: of y, with Fisher statistics.
            mean: mu given back as a constant, if the conversion was centred.
        """
        rows = self.rows(facts.geometry.kv_width)
        return {"latent": predicted_loss_increase(factors, statistics, rows=rows, centre=mean, content=content.map)}

    @abstractmethod
    def tensors(
        self,
        weights: AttentionWeights,
        factors: Sequence[Factors],
        content: LatentContent,
        mean: Tensor | None,
        geometry: Geometry,
        queries: Factors | None = None,
    ) -> dict[str, Tensor]:
        """Weights of one converted attention that are not the source's under the same name, by canonical name.

        Args:
            factors: one for each block.
            mean: mu of centred moments. y' = mu + P (y - mu), so (I - P) mu is given back as a constant: exact, and costs no cache.
            queries: of the source's q without its bias, where they are to be of low rank; None keeps them exact.
        """

    # What is saved.

    def config_entries(
        self,
        ranks: Sequence[Sequence[int]],
        biases: Collection[str],
        contents: Sequence[LatentContent],
        options: Options,
    ) -> dict[str, Any]:
        """Entries of config.json that an attention of this layout is built from.

        Args:
            ranks: [layer][block].
            biases: names of the biases that every converted attention has.
        """
        return {
            "kv_lora_rank": [sum(layer) for layer in ranks],
            "k_lora_rank": None,
            "k_bias": "k_b_proj.bias" in biases,
            "v_bias": "v_b_proj.bias" in biases,
        }

    def require_entries(self, config: Any) -> None:
        """The entries fit each other and the layers.

        Args:
            config: with the entries of `config_entries` and num_hidden_layers as attributes.

        Raises:
            CheckpointError: an entry, what it holds and what is needed.
        """
        self.require_ranks("kv_lora_rank", config.kv_lora_rank, config.num_hidden_layers)

    @staticmethod
    def require_ranks(name: str, ranks: Sequence[int], num_layers: int) -> None:
        """A positive rank for each layer.

        Raises:
            CheckpointError
        """
        if len(ranks) != num_layers or not all(rank > 0 for rank in ranks):
            raise malformed(name, ranks, f"a list with a positive rank for each of {num_layers} layers")
