"""One streaming pass over the calibration text with hooks on the key and value projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from care_mla.errors import CalibrationError, NumericalError
from care_mla.families import FamilySpec
from care_mla.families.spec import Projection
from care_mla.geometry import Geometry
from care_mla.progress import Track, silent
from care_mla.runtime import is_out_of_memory, sums_device
from care_mla.stats import CrossMoments, FisherMoments, Moments, NormalizedStatistics
from care_mla.stats.normalized import with_constant
from care_mla.text import Batch, TokenWindows

Hook = Callable[..., None]

WITHOUT_FISHER = "use --no-fisher (care calibrate) or --method care (care convert)"
"""What to do where Fisher statistics cannot be collected."""


class _LayerTap:
    """Feeds one layer's projection inputs and outputs into its `Moments`. Keys are held until the values arrive."""

    def __init__(self, layer: int, moments: Moments):
        self.layer = layer
        self.moments = moments
        self.token_weight: Tensor | None = None  # [tokens], None when all count 1
        self.counted: Tensor | None = None  # [tokens] bool, None when all count
        self._keys: Tensor | None = None

    def on_batch(self, counted: Tensor | None, token_weight: Tensor | None) -> None:
        """What counts in the coming forward pass."""
        self.counted, self.token_weight = counted, token_weight

    def hooks(self, attention: nn.Module, family: FamilySpec, geometry: Geometry) -> list[tuple[nn.Module, Hook]]:
        """Modules of an attention and the forward hooks that feed this tap."""
        (keys, key_rows), (values, value_rows) = (family.stored(projection, geometry) for projection in ("k", "v"))
        return [
            (attention.get_submodule(keys), partial(self.on_keys, key_rows)),
            (attention.get_submodule(values), partial(self.on_values, value_rows)),
        ]

    def on_keys(self, rows: slice, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of the module that holds the keys in `rows` of its outputs."""
        self._keys = _without_bias(inputs[0], output, module, rows)

    def on_values(self, rows: slice, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of the module that holds the values in `rows` of its outputs."""
        self._update(inputs[0], _without_bias(inputs[0], output, module, rows))

    def _update(self, x: Tensor, values: Tensor) -> None:
        """Inputs [batch, tokens, D] and values [batch, tokens, n] of the keys that are held."""
        assert self._keys is not None
        y = torch.cat([self._keys, values], dim=-1).flatten(0, 1)
        x = x.flatten(0, 1)
        self._keys = None
        if self.counted is not None:
            x, y = x[self.counted], y[self.counted]
        try:
            self.moments.update(x, y, self.token_weight)
        except CalibrationError as error:
            raise CalibrationError(
                f"layer {self.layer}: {error} in the key/value projections; the checkpoint is damaged or overflows in this dtype (try --dtype float32)"
            ) from error


@torch.no_grad()
def _without_bias(inputs: Tensor, output: Tensor, module: nn.Module, rows: slice) -> Tensor:
    """[batch, tokens, width] of what is in `rows` of the outputs of a projection without its bias, or of a norm over heads.

    A bias is not subtracted from the output: that has been rounded at the bias's size, which may be far above W x. The
    product of those rows is made anew instead, and rounded at its own size, as in a model without biases.
    """
    if isinstance(module, nn.Linear) and module.bias is not None:
        return linear(inputs, module.weight[rows])
    return output.detach().flatten(2)[..., rows]


def _require_weights(model: PreTrainedModel, family: FamilySpec, projections: Sequence[Projection]) -> None:
    """Refuse projections that are all zero, which statistics would show as something else.

    Raises:
        CalibrationError: the tensor is named.
    """
    geometry = family.geometry(model.config.to_dict())
    for layer in range(geometry.num_layers):
        for projection in projections:
            name, rows = family.stored(projection, geometry)
            tensor = f"{family.attention_name(layer)}.{name}.weight"
            if not bool(model.get_parameter(tensor)[rows].any()):
                whole = "" if rows.start is None and rows.stop is None else f" in the rows of {projection}"
                because, instead = ZERO["o" if projection == "o" else "kv"]
                raise CalibrationError(f"layer {layer}: {tensor} is all zero{whole}: {because}; {instead}")


ZERO = {
    "kv": (
        "there is nothing to measure or factorize",
        "the checkpoint is damaged, or the layer was never trained",
    ),
    "o": (
        "no gradient reaches its keys and values, so gradients are all zero there",
        f"{WITHOUT_FISHER}, or mend the checkpoint",
    ),
}
"""By kind of projection: what follows from its weights being zero, and what to do."""


@contextmanager
def _tapped(model: PreTrainedModel, family: FamilySpec, taps: Sequence[_LayerTap]) -> Iterator[None]:
    handles = []
    geometry = family.geometry(model.config.to_dict())
    try:
        for tap in taps:
            attention = model.get_submodule(family.attention_name(tap.layer))
            for module, hook in tap.hooks(attention, family, geometry):
                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _announce(taps: Sequence[_LayerTap], batch: Batch, device: torch.device) -> None:
    """Tell the taps which tokens of a batch count, and how much; None where all count once."""
    counted = None if batch.is_full else batch.attention_mask.flatten().bool().to(device)
    weights = batch.token_weight.flatten()
    weights = weights if batch.is_full else weights[batch.attention_mask.flatten().bool()]
    # Weights are float64, which the model's device may lack.
    token_weight = None if bool((weights == 1).all()) else weights.to(sums_device(device))
    for tap in taps:
        tap.on_batch(counted, token_weight)


@torch.no_grad()
def collect_moments(
    model: PreTrainedModel,
    family: FamilySpec,
    windows: TokenWindows,
    *,
    with_inputs: bool = False,
    batch_size: int = 8,
    alongside: Sequence[NormalizedTap] = (),
    track: Track = silent,
) -> list[Moments]:
    """Moments of every layer from one forward pass over the windows; nothing but the sums is kept.

    Args:
        with_inputs: also E[x x^T], for care_c and low-rank queries.
        alongside: from `normalized_taps`, fed by the same pass.

    Raises:
        CalibrationError: non-finite activations, with the layer named.
    """
    geometry = family.geometry(model.config.to_dict())
    _require_weights(model, family, ("k", "v"))
    device = sums_device(model.device)
    taps = [
        _LayerTap(
            layer,
            Moments.zeros(2 * geometry.kv_width, geometry.hidden_size, with_inputs=with_inputs, device=device),
        )
        for layer in range(geometry.num_layers)
    ]
    fed = [*taps, *alongside]
    decoder = model.get_decoder()  # without the language-model head: its logits are not needed
    with _tapped(model, family, fed):
        for batch in track(
            windows.batches(batch_size),
            "Collecting moments",
            len(windows),
            unit="windows",
            size=lambda b: len(b.input_ids),
        ):
            _announce(fed, batch, model.device)
            decoder(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.mask_or_none(model.device),
                use_cache=False,
            )
    return [tap.moments for tap in taps]


class _FisherTap(_LayerTap):
    """Also feeds the gradients at the outputs, as they come back, into the layer's `FisherMoments`."""

    def __init__(self, layer: int, moments: Moments, fisher: FisherMoments):
        super().__init__(layer, moments)
        self.fisher = fisher
        self.recording = True  # off in the backward pass, where checkpointing runs the layers again
        self._outputs: list[Tensor] = []
        self._gradients: dict[str, Tensor] = {}

    def on_keys(self, rows: slice, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self.recording:
            self._keys = _without_bias(inputs[0], output, module, rows)
            self._watch("k", output, rows, self._keys)

    def on_values(self, rows: slice, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self.recording:
            values = _without_bias(inputs[0], output, module, rows)
            self._update(inputs[0].detach(), values)
            self._watch("v", output, rows, values)

    def _watch(self, name: str, output: Tensor, rows: slice, y: Tensor) -> None:
        """Wait for the gradient at those rows of a projection's output; y is what they are without the bias."""
        if not output.requires_grad:
            raise CalibrationError(f"layer {self.layer}: this model's forward cuts the gradient; {WITHOUT_FISHER}")
        self._outputs.append(y)
        output.register_hook(lambda gradient: self._receive(name, gradient.flatten(2)[..., rows]))

    def _receive(self, name: str, gradient: Tensor) -> None:
        self._gradients[name] = gradient
        if len(self._gradients) == 2:
            y = torch.cat(self._outputs, dim=-1).flatten(0, 1)
            g = torch.cat([self._gradients["k"], self._gradients["v"]], dim=-1).flatten(0, 1)
            self._outputs, self._gradients = [], {}
            if self.counted is not None:
                y, g = y[self.counted], g[self.counted]
            try:
                self._add(y, g)
            except (CalibrationError, NumericalError) as error:
                raise CalibrationError(
                    f"layer {self.layer}: {error} at the keys and values{self._hint(g)}; {WITHOUT_FISHER}, or --dtype float32"
                ) from error

    @staticmethod
    def _hint(g: Tensor) -> str:
        """Why gradients may be zero or too large, where the precision can be why."""
        return " (float16 loses gradients below 6e-8 and above 65504)" if g.dtype == torch.float16 else ""

    def _add(self, y: Tensor, g: Tensor) -> None:
        """Outputs and their gradients of the tokens that count."""
        self.fisher.update(y, g, self.moments.second_moment, self.token_weight)


class NormalizedKeysTap(_FisherTap):
    """Feeds a layer's `FisherMoments` at the normalized keys: the keys of `moments` and `fisher` are those here.

    A norm is blind to a head's length, and so is the gradient before it; what stands in the norm's place, with scales of its
    own or none, is not.
    """

    def __init__(self, layer: int, geometry: Geometry, device: torch.device):
        outputs, inputs, sums = 2 * geometry.kv_width, geometry.hidden_size, sums_device(device)
        super().__init__(layer, Moments.zeros(outputs, inputs, device=sums), FisherMoments.zeros(outputs, device=sums))

    def hooks(self, attention: nn.Module, family: FamilySpec, geometry: Geometry) -> list[tuple[nn.Module, Hook]]:
        assert family.k_norm is not None
        values, rows = family.stored("v", geometry)
        return [
            (attention.get_submodule(family.k_norm), partial(self.on_keys, slice(None))),
            (attention.get_submodule(values), partial(self.on_values, rows)),
        ]


class NormalizedTap(NormalizedKeysTap):
    """Also feeds normalized queries and keys, and the input that they came from, into a layer's `NormalizedStatistics`.

    Queries are held until the values arrive, inputs until the gradients have come back.
    """

    def __init__(self, layer: int, geometry: Geometry, device: torch.device, *, with_gradients: bool):
        super().__init__(layer, geometry, device)
        self.with_gradients = with_gradients
        inputs = geometry.hidden_size
        self.queries, self.keys = (
            CrossMoments.zeros(inputs + 1, width, device=sums_device(device))
            for width in (geometry.num_heads * geometry.head_dim, geometry.kv_width)
        )
        self._normalized: Tensor | None = None
        self._inputs: Tensor | None = None

    @property
    def statistics(self) -> NormalizedStatistics:
        """What was collected."""
        return NormalizedStatistics(self.queries, self.keys)

    def hooks(self, attention: nn.Module, family: FamilySpec, geometry: Geometry) -> list[tuple[nn.Module, Hook]]:
        assert family.q_norm is not None
        queries = attention.get_submodule(family.q_norm), self.on_queries
        return [queries, *super().hooks(attention, family, geometry)]

    def on_queries(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of the queries' norm."""
        if self.recording:
            self._normalized = output.detach().flatten(2)

    def on_values(self, rows: slice, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not self.recording:
            return
        assert self._normalized is not None and self._keys is not None
        counted = slice(None) if self.counted is None else self.counted
        x, q, k = (t.detach().flatten(0, 1)[counted] for t in (inputs[0], self._normalized, self._keys))
        self._normalized, self._inputs = None, with_constant(x)
        super().on_values(rows, module, inputs, output)  # where activations that are not finite are found
        weight = x.new_ones(len(x)) if self.token_weight is None else self.token_weight
        self.queries.update(self._inputs, q, weight)
        if not self.with_gradients:
            self.keys.update(self._inputs, k, weight)

    def _watch(self, name: str, output: Tensor, rows: slice, y: Tensor) -> None:
        if self.with_gradients:
            super()._watch(name, output, rows, y)

    def _add(self, y: Tensor, g: Tensor) -> None:
        super()._add(y, g)
        assert self._inputs is not None
        norms = g.to(self.keys.weight.device).float().square().sum(1).sqrt()
        weight = norms if self.token_weight is None else norms * self.token_weight
        self.keys.update(self._inputs, y[:, : y.shape[1] // 2], weight)
        self._inputs = None


def _draw(probabilities: Tensor, generator: torch.Generator, block: int = 256) -> Tensor:
    """One label per row of [tokens, vocabulary], as [tokens, 1].

    By inversion, in two steps: first the block of the vocabulary, then the label in it. torch.multinomial would draw a
    variate for every entry, and one running sum over the whole vocabulary costs several times the blocks' sums.
    """
    tokens, vocabulary = probabilities.shape
    missing = -vocabulary % block
    padded = torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities
    blocks = padded.view(tokens, -1, block)
    uniform = torch.rand(tokens, 1, generator=generator).to(probabilities.device)
    before = blocks.sum(-1).cumsum(-1)  # [tokens, blocks]
    mass = uniform * before[:, -1:]
    chosen = torch.searchsorted(before, mass).clamp_max(before.shape[1] - 1)
    mass = mass - torch.where(chosen > 0, before.gather(1, (chosen - 1).clamp_min(0)), 0.0)
    within = blocks[torch.arange(tokens, device=chosen.device), chosen[:, 0]].cumsum(-1)  # [tokens, block]
    # Rounding may leave the mass beyond the block's last entry with any: the last label that has some is taken.
    label = torch.searchsorted(within, torch.minimum(mass, within[:, -1:]))
    return (chosen * block + label).clamp_max(vocabulary - 1)


def _sampled_gradient(logits: Tensor, counted: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient at the logits [batch, seqlen, vocabulary] of the summed cross entropy against labels drawn from the model's own prediction.

    Softmax minus one-hot, written down: autograd would hold two more tensors of that size and read them again. Labels from
    the model make it the true Fisher; those of the text, the empirical one.
    """
    probabilities = logits.detach().float().softmax(-1).flatten(0, 1)
    labels = _draw(probabilities, generator)
    gradient = probabilities.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=probabilities.dtype))
    return gradient.mul_(counted.flatten()[:, None]).view_as(logits).to(logits.dtype)


def collect_fisher(
    model: PreTrainedModel,
    family: FamilySpec,
    windows: TokenWindows,
    *,
    seed: int = 42,
    with_inputs: bool = False,
    batch_size: int = 4,
    alongside: Sequence[NormalizedKeysTap] = (),
    track: Track = silent,
) -> tuple[list[Moments], list[FisherMoments]]:
    """Moments and Fisher statistics of every layer from one forward and backward pass.

    Parameters get no gradients and layers are checkpointed: beyond the model, memory holds the layers' inputs, one layer's
    activations and one batch of logits.

    Args:
        seed: of the sampled labels.
        alongside: from `normalized_taps` or `normalized_keys_taps`, fed by the same pass.

    Raises:
        CalibrationError: non-finite or zero gradients, with the layer named, or a forward that breaks autograd.
    """
    geometry = family.geometry(model.config.to_dict())
    _require_weights(model, family, ("k", "v", "o"))
    width, device = 2 * geometry.kv_width, sums_device(model.device)
    taps = [
        _FisherTap(
            layer,
            Moments.zeros(width, geometry.hidden_size, with_inputs=with_inputs, device=device),
            FisherMoments.zeros(width, device=device),
        )
        for layer in range(geometry.num_layers)
    ]
    fed = [*taps, *alongside]
    _forward_and_backward(model, family, windows, fed, seed=seed, batch_size=batch_size, track=track)
    return [tap.moments for tap in taps], [tap.fisher for tap in taps]


def normalized_keys_taps(model: PreTrainedModel, family: FamilySpec) -> list[NormalizedKeysTap]:
    """Taps of every layer for `collect_fisher` to feed alongside; `fisher` of each is of [normalized keys ; values].

    Args:
        family: with QK-norm over heads.
    """
    geometry = family.geometry(model.config.to_dict())
    return [NormalizedKeysTap(layer, geometry, model.device) for layer in range(geometry.num_layers)]


def normalized_taps(model: PreTrainedModel, family: FamilySpec, *, with_gradients: bool = False) -> list[NormalizedTap]:
    """Taps of every layer for `collect_moments` or `collect_fisher` to feed alongside; `NormalizedTap.statistics` holds the result.

    Args:
        family: with QK-norm over heads.
        with_gradients: also collect what `normalized_keys_taps` do; needs `collect_fisher`.
    """
    geometry = family.geometry(model.config.to_dict())
    return [
        NormalizedTap(layer, geometry, model.device, with_gradients=with_gradients)
        for layer in range(geometry.num_layers)
    ]


def _forward_and_backward(
    model: PreTrainedModel,
    family: FamilySpec,
    windows: TokenWindows,
    taps: Sequence[_FisherTap],
    *,
    seed: int,
    batch_size: int,
    track: Track,
) -> None:
    """Run the windows through the model and the gradient of a sampled loss back, for its taps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), _tapped(model, family, taps), _differentiable(model, family):
        for batch in track(
            windows.batches(batch_size),
            "Collecting Fisher statistics",
            len(windows),
            unit="windows",
            size=lambda b: len(b.input_ids),
        ):
            _announce(taps, batch, model.device)
            logits = model(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.mask_or_none(model.device),
                use_cache=False,
            ).logits
            for tap in taps:
                tap.recording = False
            try:
                logits.backward(_sampled_gradient(logits, batch.attention_mask.to(model.device), generator))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise CalibrationError(
                    f"the model's backward pass failed ({str(error).splitlines()[0]}); {WITHOUT_FISHER}"
                ) from error
            for tap in taps:
                tap.recording = True


def checkpoint_layers(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Layers keep their inputs alone and are run again in the backward pass."""
    # The name changed within transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in layers:
        layer.training = (
            True  # the layer alone, so that it is checkpointed; its modules stay in evaluation, without dropout
        )


@contextmanager
def _differentiable(model: PreTrainedModel, family: FamilySpec) -> Iterator[None]:
    """Frozen parameters, differentiable embeddings, checkpointed layers; everything as before afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = list(model.get_submodule(family.layers))
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    checkpoint_layers(model, layers)
    try:
        yield
    finally:
        handle.remove()
        disable()
        for layer in layers:
            layer.training = False
        for parameter in trainable:
            parameter.requires_grad_(True)
