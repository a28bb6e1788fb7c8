"""What a method is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from care_mla.errors import CalibrationError, ConfigError
from care_mla.linalg import PositiveMatrix
from care_mla.stats import LayerStatistics


@dataclass(frozen=True)
class Weighting:
    """Options of the metrics.

    Attributes:
        shrinkage: a of (1-a) C + a lambda I, the same for every method.
        fisher_exponent: p of the tempered metric G^p; 1 trusts the quadratic model of the loss, 0 ignores it.
        fisher_shrinkage: of G, toward its mean eigenvalue.
        centre: whether means may be given back as constants; without, a conversion needs no bias.
    """

    shrinkage: float = 0.01
    fisher_exponent: float = 0.5
    fisher_shrinkage: float = 0.02
    centre: bool = True


@dataclass(frozen=True)
class Metric:
    """What a layer's factorization minimizes.

    Attributes:
        second_moment: M [m, m], shrunk; of y, or of y - mean where a mean is given.
        output_metric: G [m, m]; None is the identity.
        mean: mu [m], given back as a constant bias of the rebuilt outputs (no cache); None: not centred.
    """

    second_moment: Float[Tensor, "m m"]
    output_metric: PositiveMatrix | None = None
    mean: Float[Tensor, "m"] | None = None

    def block(self, rows: slice) -> Metric:
        """The metric of keys alone or values alone: the split layout factorizes diagonal blocks."""
        metric, mean = self.output_metric, self.mean
        return Metric(
            self.second_moment[rows, rows],
            None if metric is None else metric.block(rows),
            None if mean is None else mean[rows],
        )


MetricFunction = Callable[[LayerStatistics, Float[Tensor, "m D"], Weighting], Metric]


@dataclass(frozen=True)
class Method:
    """A named way to weigh errors.

    Attributes:
        name: as on the command line.
        source: paper and equation.
        needs_inputs: whether calibration must collect the D x D input moment.
        needs_fisher: whether calibration must run a backward pass.
        baseline: whether it is another paper's, here to compare with.
        options: fields of `Weighting` that change what it does; the others have no effect on it.
        metric: (statistics, W [m, D] float64, weighting) -> Metric.
    """

    name: str
    source: str
    needs_inputs: bool
    needs_fisher: bool
    baseline: bool
    options: frozenset[str]
    metric: MetricFunction


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    source: str,
    needs_inputs: bool = False,
    needs_fisher: bool = False,
    baseline: bool = False,
    options: Iterable[str] = (),
) -> Callable[[MetricFunction], MetricFunction]:
    """Register a metric function under a name; the arguments are fields of `Method`."""

    def register(function: MetricFunction) -> MetricFunction:
        METHODS[name] = Method(name, source, needs_inputs, needs_fisher, baseline, frozenset(options), function)
        return function

    return register


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        known = sorted(METHODS, key=lambda other: METHODS[other].baseline)
        raise ConfigError(f"unknown method {name!r}; choose one of {', '.join(known)}")
    return METHODS[name]


def require_inputs(statistics: LayerStatistics, asker: str) -> Float[Tensor, "D D"]:
    """The input second moment C = E[x x^T].

    Args:
        asker: who needs it, e.g. "method care_c".

    Raises:
        CalibrationError: it was not collected.
    """
    moments = statistics.moments
    if moments.input_second is None:
        raise CalibrationError(f"{asker} needs the input second moment; calibrate with `--inputs`")
    return moments.input_second / moments.weight
