"""Settings -> options of a command: what a field's annotation says of it is all that there is to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from care_mla.cli.recipes import RECIPE_HELP, read_recipe
from care_mla.config import Option, Settings
from care_mla.config.base import RUN_PANEL

Command = Callable[..., None]
SCALES = {"k": 1e3, "m": 1e6, "b": 1e9}

SYNONYMS: dict[str, dict[str, str]] = {}
"""Command -> words that people try -> the option that it has."""


def options_from(
    *,
    only: Mapping[str, Iterable[str]] | None = None,
    **groups: type[Settings],
) -> Callable[[Command], Command]:
    """A command whose keyword `settings` is what the user set of some settings, group by group; the rest keep their defaults.

    Args:
        only: fields of a group that are options; all that have an `Option` otherwise.
        groups: name of a group -> settings. The command receives `settings[group]`, a dict of the fields that were given.

    Source of a value, in this order: the command line, the file of `--recipe`, the default.
    """

    def decorate(command: Command) -> Command:
        parameters = [p for p in _annotated(command) if p.name != "settings"]
        parameters.append(Parameter("invocation", Parameter.KEYWORD_ONLY, annotation=typer.Context))
        origin: dict[str, tuple[str, str]] = {}
        for group, model in groups.items():
            wanted = None if only is None or group not in only else set(only[group])
            for name, field, option in model.options():
                if wanted is not None and name not in wanted:
                    continue
                origin[name] = (group, name)
                parameters.append(_parameter(name, field, option))
                SYNONYMS.setdefault(command.__name__, {}).update(
                    {f"--{word}": f"--{name.replace('_', '-')}" for word in option.also}
                )
        recipe = typer.Option(
            "--recipe",
            help=RECIPE_HELP,
            callback=read_recipe,
            is_eager=True,
            metavar="FILE",
            show_default="none",
            rich_help_panel=RUN_PANEL,
        )
        parameters.append(_keyword("recipe", Annotated[Path | None, recipe], None))

        @wraps(command)
        def run(invocation: typer.Context, **values: Any) -> None:
            del values["recipe"]  # its callback has read it
            settings: dict[str, dict[str, Any]] = {group: {} for group in groups}
            for name in list(values):
                if name in origin:
                    group, field_name = origin[name]
                    value = values.pop(name)
                    if _was_given(invocation, name):
                        settings[group][field_name] = value
            command(**values, **({"settings": settings} if groups else {}))

        ordered = sorted(parameters, key=lambda p: p.default is not Parameter.empty)
        run.__signature__ = Signature(ordered)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in ordered}
        return run

    return decorate


def _was_given(context: typer.Context, name: str) -> bool:
    """Whether the command line or the recipe's file said it."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _annotated(command: Command) -> list[Parameter]:
    """Parameters of a command with their annotations evaluated."""
    hints = get_type_hints(command, include_extras=True)
    return [
        p.replace(annotation=hints[p.name], kind=Parameter.KEYWORD_ONLY)
        for p in signature(command).parameters.values()
        if p.name in hints
    ]


def _keyword(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(name: str, field: FieldInfo, option: Option) -> Parameter:
    """The typer option of a field."""
    flag = name.replace("_", "-")
    kind, optional = _without_none(field.annotation)
    free = any(isinstance(datum, BeforeValidator) for datum in field.metadata)  # takes more words than its type says
    choices = option.choices or (get_args(kind) if get_origin(kind) is Literal and not free else ())
    default = field.get_default()
    shown: bool | str = option.default if option.default is not None else True
    more: dict[str, Any] = {}
    if choices:
        kind = Literal[tuple(choices)]
    elif get_origin(kind) is Literal:
        kind = str
    if option.count:
        more["parser"] = lambda text: count_of(str(text), f"--{flag}")
        more["metavar"] = option.metavar or "TOKENS"
    elif option.metavar is not None:
        more["metavar"] = option.metavar
    flags = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    typed = typer.Option(flags, help=option.help, rich_help_panel=option.panel, show_default=shown, **more)
    annotation = kind | None if optional else kind  # type: ignore[operator]
    return _keyword(name, Annotated[annotation, typed], default)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """(type, whether None is allowed too)"""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        assert len(kinds) == 1, annotation
        return kinds[0], True
    return annotation, False


def count_of(text: str, option: str) -> int:
    """A number of tokens: 64000, 64k, 0.25M, 1e6."""
    scale = SCALES.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * scale) if scale else int(float(text))
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{option} {text!r}: a number of tokens, e.g. 64000, 64k or 0.25M") from error
