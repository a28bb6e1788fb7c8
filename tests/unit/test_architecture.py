"""Imports point one way; heavy libraries stay in their folders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "care_mla"
ORDER = ["errors", "geometry", "records", "linalg", "stats", "methods", "ranks", "mapping", "pipeline", "cli"]
NUMERICAL = {"linalg", "stats", "methods", "ranks", "mapping"}
TRANSFORMERS = {"text", "calibration", "modeling", "healing", "evaluation", "cli"}  # cli: to silence its progress bars


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path: Path) -> None:
    part, imports = _part(path), _imports(path)
    own = {name.split(".")[1] for name in imports if name.startswith("care_mla.")}
    outside = {name.split(".")[0] for name in imports} - {"care_mla"}
    if part in ORDER:
        assert not [name for name in own if name in ORDER[ORDER.index(part) + 1 :]], f"{part} imports a later stage"
    if part in NUMERICAL:
        allowed = {"torch", "jaxtyping", "safetensors"} if part == "stats" else {"torch", "jaxtyping"}
        third_party = outside & {
            "transformers",
            "numpy",
            "pydantic",
            "rich",
            "safetensors",
            "huggingface_hub",
            "matplotlib",
            "torch",
            "jaxtyping",
        }
        assert third_party <= allowed
    if part == "records":
        assert not outside & {"torch", "transformers", "safetensors", "pydantic"}
    if part == "text":  # its users import it, not it them
        assert not own & {"calibration", "evaluation", "healing", "pipeline", "cli", "export", "report"}
    if part not in TRANSFORMERS:
        assert "transformers" not in outside
    if part != "report":
        assert "matplotlib" not in outside
    assert "triton" not in outside or part == "kernels"


def test_model_type_is_compared_in_families_alone() -> None:
    for path in FILES:
        if _part(path) == "families":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                assert "model_type" not in ast.unparse(node), f"{path}:{node.lineno} compares model_type"
