"""Taps: what of one layer's attention is summed up while batches pass through it. Each is attached to one layer, and sees no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from care_mla.errors import CalibrationError, NumericalError
from care_mla.families import FamilySpec
from care_mla.geometry import Geometry
from care_mla.runtime import Batch, sums_device
from care_mla.stats import CrossMoments, FisherMoments, Moments, NormalizedStatistics
from care_mla.stats.normalized import with_constant

Hook = Callable[..., None]

WITHOUT_FISHER = "use --no-fisher (care calibrate) or --method care (care convert)"
"""What to do where Fisher statistics cannot be collected."""


class Tap:
    """Keys and values of one layer and the input that they came from, batch by batch. Keys are held until the values arrive.

    Attributes:
        normalized: whether keys are taken after their norm.
        counted: [tokens] bool, which tokens of the batch count; None: all.
        token_weight: [counted tokens], float64; None: 1 each.
    """

    def __init__(self, layer: int, *, normalized: bool = False):
        self.layer, self.normalized = layer, normalized
        self.counted: Tensor | None = None
        self.token_weight: Tensor | None = None
        self._keys: Tensor | None = None

    def hooks(self, attention: nn.Module, family: FamilySpec, geometry: Geometry) -> list[tuple[nn.Module, Hook]]:
        """Modules of an attention and the forward hooks that feed this tap."""
        (keys, key_rows), (values, value_rows) = (family.stored(projection, geometry) for projection in ("k", "v"))
        if self.normalized:
            assert family.k_norm is not None
            keys, key_rows = family.k_norm, slice(None)
        return [
            (attention.get_submodule(keys), partial(self._on_keys, key_rows)),
            (attention.get_submodule(values), partial(self._on_values, value_rows)),
        ]

    def _on_keys(self, rows: slice, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of the module that holds the keys in `rows` of its outputs."""
        self._keys = _without_bias(inputs[0], output, module, rows)
        self.watch("k", output, rows)

    def _on_values(self, rows: slice, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of the module that holds the values in `rows` of its outputs."""
        assert self._keys is not None
        y = torch.cat([self._keys, _without_bias(inputs[0], output, module, rows)], dim=-1)
        self._keys = None
        self.receive(self.those_counted(inputs[0].detach()), self.those_counted(y))
        self.watch("v", output, rows)

    def those_counted(self, activations: Tensor) -> Tensor:
        """[batch, tokens, width] -> [counted tokens, width]."""
        flat = activations.flatten(0, 1)
        return flat if self.counted is None else flat[self.counted]

    def receive(self, x: Tensor, y: Tensor) -> None:
        """Inputs [tokens, D] and outputs [tokens, m] of the tokens of a batch that count."""

    def watch(self, name: str, output: Tensor, rows: slice) -> None:
        """The output of a module, while the layer is differentiated; what is wanted of it is in `rows`."""


class MomentsTap(Tap):
    """Feeds `Moments`."""

    def __init__(
        self,
        layer: int,
        geometry: Geometry,
        device: torch.device,
        *,
        normalized: bool = False,
        with_inputs: bool = False,
    ):
        super().__init__(layer, normalized=normalized)
        self.moments = Moments.zeros(
            2 * geometry.kv_width, geometry.hidden_size, with_inputs=with_inputs, device=sums_device(device)
        )

    def receive(self, x: Tensor, y: Tensor) -> None:
        try:
            self.moments.update(x, y, self.token_weight)
        except CalibrationError as error:
            raise CalibrationError(
                f"layer {self.layer}: {error} in the key/value projections; the checkpoint is damaged or overflows in this dtype (try --dtype float32)"
            ) from error


class FisherTap(Tap):
    """Feeds `FisherMoments` with outputs and the gradients that come back to them.

    With normalized keys, outputs and gradients are those there: a norm is blind to a head's length, and so is the gradient before it; what
    stands in the norm's place, with scales of its own or none, is not.
    """

    def __init__(
        self,
        layer: int,
        geometry: Geometry,
        device: torch.device,
        second_moment: Tensor,
        *,
        normalized: bool = False,
        with_keys: bool = False,
    ):
        """
        Args:
            second_moment: E[y y^T] of all tokens, by which gradients are weighed.
            with_keys: also sum up keys beside the input, weighted by the gradients' norms.
        """
        super().__init__(layer, normalized=normalized)
        sums = sums_device(device)
        try:
            self.fisher = FisherMoments.zeros(2 * geometry.kv_width, device=sums)
            self.inverse = FisherMoments.leverage_metric(second_moment.to(sums))
        except (CalibrationError, NumericalError) as error:
            raise self._refused(error) from error
        self.keys = CrossMoments.zeros(geometry.hidden_size + 1, geometry.kv_width, device=sums) if with_keys else None
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._gradients: dict[str, Tensor] = {}

    def receive(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = (x if self.keys is not None else None), y.detach()

    def watch(self, name: str, output: Tensor, rows: slice) -> None:
        if not output.requires_grad:
            raise CalibrationError(f"layer {self.layer}: this model's forward cuts the gradient")
        output.register_hook(lambda gradient: self._arrived(name, gradient.flatten(2)[..., rows]))

    def _arrived(self, name: str, gradient: Tensor) -> None:
        self._gradients[name] = gradient
        if len(self._gradients) < 2:
            return
        g = self.those_counted(torch.cat([self._gradients["k"], self._gradients["v"]], dim=-1))
        self._gradients = {}
        assert self._y is not None
        try:
            self.fisher.update(self._y, g, self.inverse, self.token_weight)
        except CalibrationError as error:
            raise self._refused(error, g) from error
        if self.keys is not None:
            assert self._x is not None
            norms = g.to(self.keys.weight.device).float().square().sum(1).sqrt()
            weight = norms if self.token_weight is None else norms * self.token_weight
            self.keys.update(with_constant(self._x), self._y[:, : self._y.shape[1] // 2], weight)
        self._x = self._y = None

    def _refused(self, error: Exception, g: Tensor | None = None) -> CalibrationError:
        half = g is not None and g.dtype == torch.float16
        hint = " (float16 loses gradients below 6e-8 and above 65504)" if half else ""
        return CalibrationError(
            f"layer {self.layer}: {error} at the keys and values{hint}; {WITHOUT_FISHER}, or --dtype float32"
        )

    def require_gradients(self) -> None:
        """Refuse a layer in which no gradient came back.

        Raises:
            CalibrationError
        """
        if not float(self.fisher.num_tokens) > 0:
            raise CalibrationError(f"layer {self.layer}: this model's forward cuts the gradient")


class NormalizedTap(Tap):
    """Feeds normalized queries, and keys unless a `FisherTap` does, beside the input that they came from. Queries are held until the values arrive."""

    def __init__(self, layer: int, geometry: Geometry, device: torch.device, *, with_keys: bool):
        super().__init__(layer, normalized=True)
        inputs, sums = geometry.hidden_size + 1, sums_device(device)
        self.queries = CrossMoments.zeros(inputs, geometry.num_heads * geometry.head_dim, device=sums)
        self.keys = CrossMoments.zeros(inputs, geometry.kv_width, device=sums) if with_keys else None
        self._queries: Tensor | None = None

    def hooks(self, attention: nn.Module, family: FamilySpec, geometry: Geometry) -> list[tuple[nn.Module, Hook]]:
        assert family.q_norm is not None
        return [
            (attention.get_submodule(family.q_norm), self._on_queries),
            *super().hooks(attention, family, geometry),
        ]

    def _on_queries(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of the queries' norm."""
        self._queries = output.detach().flatten(2)

    def receive(self, x: Tensor, y: Tensor) -> None:
        assert self._queries is not None
        weight = x.new_ones(len(x)) if self.token_weight is None else self.token_weight
        x1 = with_constant(x)
        self.queries.update(x1, self.those_counted(self._queries), weight)
        self._queries = None
        if self.keys is not None:
            self.keys.update(x1, y.detach()[:, : y.shape[1] // 2], weight)

    def statistics(self, keys: CrossMoments | None) -> NormalizedStatistics:
        """What was collected, with the keys that it did not collect itself."""
        found = self.keys if keys is None else keys
        assert found is not None
        return NormalizedStatistics(self.queries, found)


@torch.no_grad()
def _without_bias(inputs: Tensor, output: Tensor, module: nn.Module, rows: slice) -> Tensor:
    """[batch, tokens, width] of what is in `rows` of the outputs of a projection without its bias, or of a norm over heads.

    A bias is not subtracted from the output: that has been rounded at the bias's size, which may be far above W x. The
    product of those rows is made anew instead, and rounded at its own size, as in a model without biases.
    """
    if isinstance(module, nn.Linear) and module.bias is not None:
        return linear(inputs, module.weight[rows])
    return output.detach().flatten(2)[..., rows]


@contextmanager
def attached(taps: Sequence[Tap], attention: nn.Module, family: FamilySpec, geometry: Geometry) -> Iterator[None]:
    """Taps fed by an attention for as long as the context lasts."""
    handles = []
    try:
        for tap in taps:
            for module, hook in tap.hooks(attention, family, geometry):
                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def announce(taps: Sequence[Tap], batch: Batch, device: torch.device) -> None:
    """Tell the taps which tokens of the coming batch count, and how much; None where all count once."""
    counted = None if batch.is_full else batch.attention_mask.flatten().bool().to(device)
    weights = batch.token_weight.flatten()
    weights = weights if batch.is_full else weights[batch.attention_mask.flatten().bool()]
    # Weights are float64, which the model's device may lack.
    token_weight = None if bool((weights == 1).all()) else weights.to(sums_device(device))
    for tap in taps:
        tap.counted, tap.token_weight = counted, token_weight
