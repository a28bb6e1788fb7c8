"""What all settings are: frozen, validated, and written down once: value, bounds, help text and place on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from care_mla.errors import ConfigError

LARGEST_SEED = 2**40
"""Generators take 64 bits, and seeds of parts and epochs are made from this one."""

TEXT_PANEL = "Advanced: calibration text"
RECIPE_PANEL = "Advanced: how weights are converted"
RANK_PANEL = "Advanced: budget and ranks"
MLA_PANEL = "Advanced: layout mla"
TRAINING_PANEL = "Advanced: training"
RUN_PANEL = "Advanced: how it runs"

Stage = TypeVar("Stage", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """How a field stands on the command line; kept in its annotation.

    Attributes:
        help: what it means.
        panel: group in the help; None is the first screen.
        default: what happens where nothing is given, if the default alone does not tell.
        choices: what may be given.
        metavar: how a value is called.
        count: a number that may be written 64k or 0.25M.
        also: other words for it that people try; answered with "did you mean".
    """

    help: str
    panel: str | None = None
    default: str | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    count: bool = False
    also: tuple[str, ...] = ()


class Settings(BaseModel):
    """Frozen, no unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def make(cls, **values: Any) -> Any:
        """Validated settings.

        Raises:
            ConfigError: one sentence naming the option.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
            if first["type"] == "extra_forbidden":
                raise ConfigError(f"{option}: there is no such option; there are {_flags(cls)}") from error
            raise ConfigError(f"{option} {first.get('input')!r}: {first['msg'].lower()}") from error

    @classmethod
    def options(cls) -> Iterator[tuple[str, FieldInfo, Option]]:
        """(name, field, option) of all fields that stand on the command line, in their order."""
        for name, field in cls.model_fields.items():
            for datum in field.metadata:
                if isinstance(datum, Option):
                    yield name, field, datum


def takes(*models: type[Settings]) -> Callable[[Stage], Stage]:
    """A stage whose `**values` are fields of these settings says so to `help()` and completion."""

    def describe(stage: Stage) -> Stage:
        own = signature(stage)
        fixed = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        fields = {
            name: Parameter(name, Parameter.KEYWORD_ONLY, default=field.get_default(), annotation=field.annotation)
            for model in models
            for name, field in model.model_fields.items()
            if name not in own.parameters
        }
        stage.__signature__ = Signature([*fixed, *fields.values()], return_annotation=own.return_annotation)  # type: ignore[attr-defined]
        return stage

    return describe


def _flags(model: type[Settings]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in model.model_fields)
