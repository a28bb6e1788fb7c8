"""Every refusal is one sentence with exit code 1 or 2, leaves everything as it was, and stands in docs/troubleshooting.md.

`CARE_WRITE_TROUBLESHOOTING=1 pytest -n0 tests/refusals` writes that table anew.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

import refusals
from refusals import Place, Refusal, said

DOCUMENT = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
HEAD = """# What care says, and of what

Every refusal is one sentence, exit code 1 (2 for a misused option), and leaves everything as it was. SOURCE, OUT, TEXT and WORK
stand for paths. The tests make this page.
"""
MODULES = sorted(m.name for m in pkgutil.iter_modules(refusals.__path__) if not m.name.startswith("test_"))
CASES: list[Refusal] = [case for m in MODULES for case in importlib.import_module(f"refusals.{m}").CASES]


def _row(case: Refusal, sentence: str) -> str:
    cells = (cell.replace("|", "\\|") for cell in (case.given, sentence))
    return f"| {' | '.join(cells)} |"


@pytest.fixture(scope="session")
def rows() -> Iterator[dict[str, str]]:
    """Rows by case, as they are said in this run."""
    found: dict[str, str] = {}
    yield found
    if os.environ.get("CARE_WRITE_TROUBLESHOOTING"):
        parts = [HEAD]
        for kind, cases in groupby(CASES, key=lambda case: case.kind):
            parts.append(f"\n## {kind}\n\n| given | said |\n|-|-|")
            parts += [found[case.id] for case in cases]
        DOCUMENT.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _everything(directory: Path) -> dict[Path, object]:
    """Names and contents below a directory."""
    return {
        path: path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_refusal(
    case: Refusal,
    care: Callable[..., str],
    tiny: Callable[..., Path],
    tmp_path: Path,
    text_file: Path,
    rows: dict[str, str],
) -> None:
    place = Place(tmp_path, tiny(directory=tmp_path / "model"), tmp_path / "out", tmp_path / "text.txt")
    place.text.write_bytes(text_file.read_bytes())
    case.prepare(place)
    before = _everything(tmp_path)
    words = list(case.command)
    for name, path in place.names.items():
        words = [word.replace(name, path) for word in words]
    sentence = said(care(*words, code=case.code), place)
    assert case.says in sentence and "\n" not in sentence, sentence
    assert _everything(tmp_path) == before
    rows[case.id] = _row(case, sentence)
    if not os.environ.get("CARE_WRITE_TROUBLESHOOTING"):
        assert rows[case.id] in DOCUMENT.read_text(encoding="utf-8"), f"{DOCUMENT.name} says otherwise: {rows[case.id]}"
