"""Imports point one way; heavy libraries stay in their rooms; a layout and a family are compared by nobody else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from care_mla.layouts import LAYOUTS

PACKAGE = Path(__file__).parents[2] / "src" / "care_mla"
ORDER = (
    ["errors", "lazy", "interrupts", "geometry", "names"],
    ["files", "progress", "records"],
    ["families"],
    ["linalg", "config", "runtime"],
    ["checkpoint", "stats", "rope"],
    ["methods"],
    ["layouts"],
    ["ranks", "modeling", "export"],
    ["text"],
    ["calibration", "evaluation"],
    ["conversion", "healing"],
    ["report"],
    ["pipeline"],
    ["registration", "cli"],
)
"""Rooms and files of the package: each imports from earlier lines, and from those before it on its own."""
NUMERICAL = {"linalg", "stats", "methods", "rope", "layouts", "ranks"}
TRANSFORMERS = {"text", "calibration", "modeling", "healing", "evaluation", "cli"}  # cli: to silence its progress bars
LONGEST = 300
"""Lines of a file that gives no reason for more at its head."""


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
RANK = {part: index for index, part in enumerate(part for line in ORDER for part in line)}


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, for types alone and on first use (`lazy.on_first_use`) included."""
    names: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "care_mla")
        elif path.name == "__init__.py" and isinstance(node, ast.Dict):
            names.update(key.value for key in node.keys if isinstance(key, ast.Constant) and "." in str(key.value))
    return names


def test_every_part_has_its_place() -> None:
    assert {_part(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path: Path) -> None:
    part, imports = _part(path), _imports(path)
    own = {name.split(".")[1] for name in imports if name.startswith("care_mla.")} - {part, "__version__"}
    outside = {name.split(".")[0] for name in imports} - {"care_mla"}
    upward = sorted(name for name in own if RANK[name] >= RANK[part])
    assert not upward, f"{part} imports {upward}, which stand above it"
    if part in NUMERICAL:
        heavy = {"transformers", "numpy", "pydantic", "rich", "huggingface_hub", "matplotlib", "safetensors"}
        assert not outside & (heavy - ({"safetensors"} if part == "stats" else set()))
    if part in {"records", "families", "config", "names", "files", "geometry", "errors"}:
        assert not outside & {"transformers"}
    if part == "records":
        assert not outside & {"torch", "safetensors", "pydantic"}
    if part not in TRANSFORMERS:
        assert "transformers" not in outside
    if part != "report":
        assert "matplotlib" not in outside
    assert "triton" not in outside or part == "kernels"


def _compared(tree: ast.Module) -> list[ast.Compare | ast.Match]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.Match)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_families_and_layouts_are_compared_in_their_rooms_alone(path: Path) -> None:
    for node in _compared(TREES[path]):
        where, inside = f"{path}:{node.lineno}", list(ast.walk(node))
        if _part(path) != "families":
            assert "model_type" not in ast.unparse(node), f"{where} compares model_type"
        if _part(path) != "layouts":
            words = {one.value for one in inside if isinstance(one, ast.Constant) and isinstance(one.value, str)}
            names = {one.id for one in inside if isinstance(one, ast.Name)}
            assert not words & set(LAYOUTS), f"{where} compares a layout's name"
            assert not names & {name.upper() for name in LAYOUTS}, f"{where} compares a layout"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_long_files_say_why(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = ast.get_docstring(TREES[path]) or ""
    assert text.count("\n") <= LONGEST or "One file" in head, f"{path}: {LONGEST} lines and no reason ('One file, ...')"
