"""The documents: links, anchors, generated tables, named functions, and the site that is made of them."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import typer

from care_mla.cli import _app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
CARE = re.compile(r"(?:^|`)care ([a-z][^`\n#]*)", re.MULTILINE)
REPORTS_OF_THE_PAST = ("taken-out.md", "troubleshooting.md")
"""Pages that name options which are gone, or never were."""
FUNCTION = re.compile(r"`(src/[\w/]+\.py):([\w.]+)`")


def _named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@lru_cache
def _prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


@lru_cache
def _anchors(page: Path) -> frozenset[str]:
    """Ids of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in headings)


def _broken(page: Path) -> Iterator[str]:
    for target in LINK.findall(_prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in _anchors(linked):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(_broken(page)) == []


@lru_cache
def _definitions(path: Path) -> frozenset[str]:
    """Functions and classes of a file, and Class.method."""
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    outer = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)]
    inner = {f"{node.name}.{member.name}" for node in outer for member in node.body if isinstance(member, kinds)}
    return frozenset(inner | {node.name for node in outer})


def test_named_functions_exist() -> None:
    """`src/FILE.py:NAME` of any page; docs/method.md has one in every entry."""
    named = {(path, name) for page in PAGES for path, name in FUNCTION.findall(_prose(page))}
    assert len(named) > 30
    missing = [
        f"{path}:{name} is now in {_files_with(name) or 'no file'}"
        for path, name in sorted(named)
        if not (ROOT / path).is_file() or name not in _definitions(ROOT / path)
    ]
    assert missing == []


def _files_with(name: str) -> str:
    files = sorted((ROOT / "src").rglob("*.py"))
    return " or ".join(_named(path) for path in files if name in _definitions(path))


def test_every_entry_of_the_method_is_whole() -> None:
    text = _prose(ROOT / "docs" / "method.md")
    for entry in text.split("\n### ")[1:]:
        fields = re.findall(r"^- (\w[\w ]*): ", entry.split("\n## ")[0], re.MULTILINE)
        assert fields == ["Symbol", "Formula", "Unit", "Made by"], entry


@lru_cache
def _options() -> dict[str, frozenset[str]]:
    """Command -> its options."""
    group = typer.main.get_group(_app())
    return {
        name: frozenset(word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts))
        for name, command in group.commands.items()
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in REPORTS_OF_THE_PAST], ids=_named)
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    for written in CARE.findall(page.read_text(encoding="utf-8")):
        command, *words = written.split()
        assert command in _options() or command == "COMMAND", written
        for word in words:
            assert not word.startswith("--") or word in _options()[command], written


def test_tables_are_what_the_results_say() -> None:
    specification = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert [_named(page) for page in module.outdated()] == [], "run python docs/make_results.py"
    used = {name for page in module.pages() for _, name, _ in module.MARKED.findall(page.read_text(encoding="utf-8"))}
    assert used == set(module.TABLES)


def test_nothing_points_out_of_the_repository() -> None:
    for page in PAGES:
        assert "../shared" not in page.read_text(encoding="utf-8"), page


def test_the_site_builds(tmp_path: Path) -> None:
    """With every warning an error: pages outside the navigation, links to nowhere."""
    for module in ("mkdocs", "material", "latex2mathml"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1"})
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "site" / "method.html").read_text(encoding="utf-8")
    assert "<math " in page and "arithmatex" not in page
    outside = re.findall(r'<(?:link|script|img)[^>]*(?:src|href)="(https?:[^"]+)"', page)
    assert outside == []
