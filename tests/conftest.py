"""Shared fixtures: tiny random models of every family, the real model, and ../shared/data where it exists."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

# Shapes of the numerical folders are checked at run time throughout the suite.
_hook = install_import_hook(
    ["care_mla.linalg", "care_mla.stats", "care_mla.methods", "care_mla.ranks", "care_mla.rope", "care_mla.layouts"],
    "beartype.beartype",
)
with _hook:
    import care_mla.layouts
    import care_mla.methods
    import care_mla.ranks
    import care_mla.stats

    for package in (care_mla.layouts, care_mla.ranks):  # whose names are imported when they are first used
        for name in package.__all__:
            getattr(package, name)

import pytest
import torch
import transformers
from shelf import Shelf
from tiny import TINY, leave_out_figures, write_tiny_model

import care_mla
from care_mla.cli import main
from care_mla.interrupts import SIGNALS, STOP

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny models lose by threads; pytest-xdist uses the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # and so do the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def _hears_interrupts() -> None:
    """Shells start background jobs deaf to SIGINT, and processes that the tests start would inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports with what their figures are told in place of the figures, which take longer to draw than a tiny model to convert."""

    leave_out_figures(monkeypatch)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """tiny("qwen3", num_key_value_heads=1) -> directory of a random model with a byte tokenizer."""

    def make(name: str = "llama", directory: Path | None = None, **changes: object) -> Path:
        return write_tiny_model(directory or tmp_path / f"source-{name}", name, **changes)

    return make


@pytest.fixture
def care(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run `care ...` here; returns what it printed, after checking the exit code."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("CARE_DEBUG", "1")  # what nobody foresaw is a failure, not a sentence
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    unraisable = sys.unraisablehook

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["care", *map(str, arguments)])
        try:
            main()
            found: object = 0
        except SystemExit as stop:
            found = stop.code or 0
        finally:  # a command does not listen any more at its end
            STOP.clear()
            sys.unraisablehook = unraisable
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed = "".join(capsys.readouterr())
        assert found == code, printed
        return printed

    return run


@pytest.fixture(params=sorted(TINY))
def family(request: pytest.FixtureRequest) -> str:
    """Every family, by the name of its tiny configuration."""
    return request.param


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough plain text to calibrate a tiny model on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        " ".join(f"line {i} of {i * i % 97} words, {chr(97 + i % 26) * (i % 7)}" for i in range(2000)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Shelf:
    """What this session's workers share; what they make there is not changed by a test."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Shelf(shared / "contract", text_file)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str], Path]:
    """converted("joint") -> a small Llama in that layout; "source" it came from, "stock" as exported."""
    directory = tmp_path_factory.mktemp("converted")

    def make(kind: str) -> Path:
        out = directory / kind
        if out.exists():
            return out
        if kind == "source":
            return write_tiny_model(out, "llama", num_hidden_layers=2)
        if kind == "stock":
            care_mla.export(make("mla"), out)
            return out
        text = {"calibration": str(text_file), "samples": 8, "seqlen": 32}
        recipe: dict[str, Any] = {"method": "svd", "ranks": "uniform", "kv_save": 0.75}
        if kind == "mla":
            recipe |= {"method": "care", "kv_save": 0.5, "qk_rope_head_dim": 8, "rope": "stock"}
        care_mla.convert(make("source"), out, layout=kind, calibration=text, **recipe)
        return out

    return make


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an HF directory; `make test` prepares it, a bare pytest run makes it here."""
    prepared = Path(os.environ.get("CARE_TEST_MODEL", ROOT / "build" / "smollm2-135m"))
    if (prepared / "config.json").is_file():
        return prepared
    out = tmp_path_factory.mktemp("real") / "smollm2-135m"
    care_mla.fetch("smollm2-135m", out)
    return out


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Calibration and evaluation text that does not travel with the repository."""
    if not DATA.is_dir():
        pytest.skip(
            f"{DATA} is absent: this test compares with reference numbers on texts that are not in the repository"
        )
    return DATA
