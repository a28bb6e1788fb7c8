"""The command line as it is generated: nothing hand-written to go stale, nothing heavy to wait for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from care_mla import cli, methods, names, ranks
from care_mla.config import CalibrationSettings, EvaluationSettings, ExportSettings, HealSettings, Recipe, TextSettings
from care_mla.export.engines import Engine

Care = Callable[..., str]
COMMANDS = ("calibrate", "convert", "evaluate", "export", "fetch", "heal", "inspect", "plan", "report")
SETTINGS = {
    "calibrate": (CalibrationSettings,),
    "convert": (Recipe, TextSettings),
    "evaluate": (EvaluationSettings,),
    "export": (ExportSettings,),
    "heal": (HealSettings,),
}


def _params(command: str) -> dict[str, object]:
    return {p.name: p for p in get_command(cli._app()).commands[command].params}


@pytest.mark.parametrize("command", SETTINGS)
def test_every_field_with_an_option_is_one_with_its_default(command: str) -> None:
    params = _params(command)
    for model in SETTINGS[command]:
        for name, field, option in model.options():
            param = params[name]
            assert param.default == field.get_default(), name
            assert option.help == param.help, name


def test_plan_forecasts_whatever_convert_decides() -> None:
    """All of the recipe but what a forecast cannot depend on: what is written, and the refit after it."""
    left_out = {"rank", "cache_elements", "refit", "refit_tokens", "refit_ridge", "dtype"}
    assert set(Recipe.model_fields) - set(_params("plan")) == left_out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_defaults_choices_and_examples(command: str, care: Care) -> None:
    printed = care(command, "--help")
    assert "Examples:" in printed and f"care {command}" in printed
    assert "--recipe" in printed
    for name, field, option in (each for model in SETTINGS.get(command, ()) for each in model.options()):
        flag = "--" + name.replace("_", "-")
        assert flag in printed
        if option.default is None and isinstance(field.get_default(), int | float) and field.annotation is not bool:
            assert f"[default: {field.get_default()}]" in printed, name


def test_names_are_those_of_the_tables() -> None:
    assert set(names.METHODS) | set(names.BASELINES) == set(methods.METHODS)
    assert set(names.BASELINES) == {name for name, method in methods.METHODS.items() if method.baseline}
    assert set(names.ALLOCATORS) == set(ranks.ALLOCATORS)
    assert set(names.ENGINES) == set(Engine.__args__)


def test_bare_care_and_version(care: Care) -> None:
    import care_mla

    assert "convert" in care() and care_mla.__version__ in care("--version")


def test_a_recipe_of_yaml_and_of_a_manifest(
    care: Care, tiny: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    """The file gives what the command line does not; a manifest makes the same conversion again."""
    source, recipe = tiny(), tmp_path / "recipe.yaml"
    recipe.write_text(f"kv-save: 0.5\nmethod: care\ncalibration: {text_file}\nsamples: 4\nseqlen: 32\npack: false\n")
    care("convert", source, "--recipe", recipe, "--out", tmp_path / "a")
    first = json.loads((tmp_path / "a" / "care_manifest.json").read_text())
    assert first["recipe"]["method"] == "care" and first["kv_save"] == 0.5
    assert first["calibration"]["settings"]["samples"] == 4 and first["calibration"]["settings"]["pack"] is False
    care("convert", source, "--recipe", tmp_path / "a" / "care_manifest.json", "--out", tmp_path / "b")
    second = json.loads((tmp_path / "b" / "care_manifest.json").read_text())
    assert second == first
    care("convert", source, "--recipe", recipe, "--method", "svd", "--out", tmp_path / "c")
    assert json.loads((tmp_path / "c" / "care_manifest.json").read_text())["recipe"]["method"] == "svd"


def test_each_command_says_the_next_one(care: Care, tiny: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    source, stats, out = tiny(), tmp_path / "stats", tmp_path / "out"
    assert f"next: care convert {source}" in care("inspect", source)
    text = ["--calibration", text_file, "--samples", 4, "--seqlen", 32]
    assert f"next: care plan {source} --stats {stats}" in care("calibrate", source, "--out", stats, *text)
    plan = care("plan", source, "--stats", stats, "--kv-save", "0.5", "--plot", tmp_path / "plan.svg")
    assert f"next: care convert {source} --stats {stats} --kv-save 0.5" in plan
    converted = care("convert", source, "--stats", stats, "--kv-save", "0.5", "--out", out)
    assert f"next: care evaluate {out} --reference {source}" in converted


def _heavy_after(*arguments: object) -> str:
    """Heavy libraries that a command has imported."""
    code = "import sys; from care_mla.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()[-1]


@pytest.mark.parametrize("command", ["--help", "--version", "convert --help"])
def test_help_imports_nothing_heavy(command: str) -> None:
    assert _heavy_after(*command.split()) == "[]"


def test_an_ordinary_config_is_inspected_without_heavy_libraries(tiny: Callable[..., Path]) -> None:
    assert _heavy_after("inspect", tiny()) == "[]"


def _cpu_seconds(*arguments: object) -> float:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "care_mla.cli", *map(str, arguments)]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


@pytest.mark.skipif(sys.platform == "win32", reason="counts CPU seconds as POSIX does")
def test_help_and_inspect_take_less_than_two_cpu_seconds(tiny: Callable[..., Path]) -> None:
    assert _cpu_seconds("--help") < 2
    assert _cpu_seconds("inspect", tiny()) < 2


def test_inspect_says_what_each_engine_can_run(care: Care, tiny: Callable[..., Path]) -> None:
    printed = " ".join(care("inspect", tiny(), "--batch", 4).split())
    assert "GiB for a batch of 4" in printed and "vLLM, its own model" in printed
