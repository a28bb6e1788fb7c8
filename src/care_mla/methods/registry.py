"""What a method is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from care_mla.errors import CalibrationError, ConfigError
from care_mla.stats import Moments


@dataclass(frozen=True)
class Metric:
    """What `linalg.decompose` takes: the (shrunk) second moment M and the output metric G (None: identity)."""

    second_moment: Float[Tensor, "m m"]
    output_metric: Float[Tensor, "m m"] | None = None

    def block(self, rows: slice) -> Metric:
        """The metric of keys alone or values alone: the split layout factorizes diagonal blocks."""
        metric = self.output_metric
        return Metric(self.second_moment[rows, rows], None if metric is None else metric[rows, rows])


MetricFunction = Callable[[Moments, Float[Tensor, "m D"], float], Metric]


@dataclass(frozen=True)
class Method:
    """A named way to weigh errors.

    Attributes:
        name: as on the command line.
        source: paper and equation.
        needs_inputs: whether calibration must collect the D x D input moment.
        metric: (moments, W [m, D] float64, shrinkage) -> Metric.
    """

    name: str
    source: str
    needs_inputs: bool
    metric: MetricFunction


METHODS: dict[str, Method] = {}


def method(name: str, *, source: str, needs_inputs: bool = False) -> Callable[[MetricFunction], MetricFunction]:
    """Register a metric function under a name."""

    def register(function: MetricFunction) -> MetricFunction:
        METHODS[name] = Method(name, source, needs_inputs, function)
        return function

    return register


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def require_inputs(moments: Moments, name: str) -> Float[Tensor, "D D"]:
    """The input second moment C = E[x x^T].

    Raises:
        CalibrationError: it was not collected.
    """
    if moments.input_second is None:
        raise CalibrationError(f"method {name} needs the input second moment; calibrate with `--inputs`")
    return moments.input_second / moments.weight
