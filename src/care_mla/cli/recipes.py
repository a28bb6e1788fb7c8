"""`--recipe FILE`: options of a command out of a file, where the command line does not give them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from care_mla.errors import ConfigError

RECIPE_HELP = (
    "Options out of a file, where the command line does not give them: YAML (`kv_save: 0.5`), or the care_manifest.json of a "
    "conversion, to do it again."
)
MANIFEST_FORMAT = "care-mla manifest"
LARGEST = 1 << 26
"""Bytes; a manifest of a large model has a few million."""


def read_recipe(context: typer.Context, value: Path | None) -> Path | None:
    """Callback of the option: what the file says become the defaults of the command.

    Raises:
        ConfigError: the file cannot be read, or names what the command does not have.
    """
    if value is None or context.resilient_parsing:
        return value
    known = {
        parameter.name: parameter
        for parameter in context.command.params
        if parameter.param_type_name == "option" and parameter.name not in ("recipe", "help")
    }
    values = _load(value)
    if str(values.get("format", "")).startswith(MANIFEST_FORMAT):
        values = {name: given for name, given in options_of_manifest(values).items() if name in known}
    chosen: dict[str, Any] = {}
    for word, given in values.items():
        name = str(word).replace("-", "_")
        if name not in known:
            raise ConfigError(
                f"--recipe {value}: care {context.info_name} has no option {word!r}{did_you_mean(name, known)}"
            )
        if given is not None:
            chosen[name] = given if isinstance(given, bool) else _as_typed(value, word, given)
    context.default_map = {**(context.default_map or {}), **chosen}
    return value


def options_of_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """What made a conversion, as options of `care convert`: its recipe with the budget that was asked for, and its text."""
    recipe = manifest.get("recipe")
    calibration = manifest.get("calibration")
    if not isinstance(recipe, dict) or not isinstance(calibration, dict):
        raise ConfigError("this manifest has no recipe; it may be of another version of care-mla")
    settings = calibration.get("settings")
    text = settings if isinstance(settings, dict) else {}
    return {**text, **recipe}


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """ "; did you mean ...?" or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _load(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds one mapping.

    Raises:
        ConfigError
    """
    import yaml

    path = path.expanduser()
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"--recipe {path} is no recipe: it has {path.stat().st_size / 1e6:.0f} MB")
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--recipe {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--recipe {path} is neither YAML nor JSON ({reason[:150]}); a line is `name: value`"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"--recipe {path}: lines of `name: value` are needed, such as `kv_save: 0.5`")
    return values


def _as_typed(path: Path, word: object, value: object) -> str:
    """A value as it would be typed; lists are what is separated by commas.

    Raises:
        ConfigError: a mapping.
    """
    if isinstance(value, dict):
        raise ConfigError(f"--recipe {path}: {word} is a mapping; a line is `name: value`")
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
