"""Every command stopped at moments of its run, or given too small a disk: what it says, what it leaves, what the next run makes of it.

    python benchmarks/robustness.py signals --signal SIGKILL --moments 20
    python benchmarks/robustness.py disk --sizes 8           # mounts a tmpfs: needs root
    python benchmarks/robustness.py table                    # what docs/robustness.md shows

Tiny random models, made here. Writes benchmarks/results/robustness.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from care_mla.checkpoint.outputs import MARK

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "robustness.json"
CARE = [sys.executable, "-c", "import care_mla.cli as cli; cli.main()"]
LOCK = ".lock"
"""Ending of files that a run may leave: they are empty, and removing one would let two runs in."""
IMPORTS = 1.2
"""Seconds that Python takes before the command listens; nothing is written then."""
Words = Callable[[Path], list[object]]


def inputs(directory: Path) -> dict[str, Words]:
    """The words of every command by name, given where its output goes, on a tiny model with its statistics and conversions."""
    sys.path.insert(0, str(ROOT / "tests"))
    import transformers
    from tiny import write_tiny_model

    import care_mla

    transformers.logging.disable_progress_bar()
    source = write_tiny_model(directory / "source", "llama", num_hidden_layers=4)
    text = directory / "text.txt"
    text.write_text(" ".join(f"line {i} of {i * i % 97} words" for i in range(20000)))
    stats = care_mla.calibrate(source, directory / "stats", calibration=str(text), samples=8, seqlen=32, fisher=True)
    mla = {"layout": "mla", "rope": "stock", "method": "care", "ranks": "uniform", "qk_rope_head_dim": 8}
    care_mla.convert(source, directory / "mla", **mla, kv_save=0.5, stats=stats)
    care_mla.convert(source, directory / "joint", kv_save=0.5, stats=stats)
    few = ["--eval-every", 2, "--eval-blocks", 2, "--seqlen", 32, "--batch-size", 4]
    return {
        "calibrate": lambda out: ["calibrate", source, "--out", out, "--calibration", text, "--samples", 64, "--seqlen", 64],
        "convert": lambda out: ["convert", source, "--out", out, "--stats", stats, "--kv-save", 0.75],
        "convert --heal-tokens": lambda out: ["convert", source, "--out", out, "--stats", stats, "--kv-save", 0.5, "--heal-tokens", "2k", "--heal-data", text],
        "export": lambda out: ["export", directory / "mla", "--out", out],
        "fetch": lambda out: ["fetch", source, out],
        "heal": lambda out: ["heal", directory / "joint", "--out", out, "--tokens", "2k", "--data", text, "--teacher", source, *few],
        "plan": lambda out: ["plan", source, "--stats", stats, "--plot", out.with_name("plan.svg"), "--json", out.with_name("plan.json")],
    }  # fmt: skip


def start(words: list[object], temporary: Path) -> subprocess.Popen[str]:
    """One command, with a folder for its temporary files."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*CARE, *map(str, words)], **pipes, text=True, env={**os.environ, "TMPDIR": str(temporary)})


def run(words: list[object], temporary: Path) -> tuple[int, str]:
    """Exit code and stderr of one command that is left alone."""
    process = start(words, temporary)
    _, stderr = process.communicate()
    return process.returncode, stderr


def damage(out: Path) -> list[str]:
    """What is wrong with an output that stands."""
    if not out.exists():
        return []
    if not (out / MARK).exists():
        return ["an output without its record"]
    files = json.loads((out / MARK).read_text())["files"]
    return [f"{name} is missing" for name in files if not (out / name).exists()]


def unforeseen(stderr: str) -> list[str]:
    """Tracebacks, and what the command itself did not expect."""
    return [stderr[-400:]] if "Traceback" in stderr or "unforeseen" in stderr else []


def left_in(directory: Path) -> list[str]:
    """Names in a directory but locks."""
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(LOCK))


def signals(name: str, words: Words, place: Path, *, number: signal.Signals, moments: int) -> dict[str, Any]:
    """A command stopped at so many moments of its run, spread evenly, and then run to its end."""
    work, temporary = place / "work", place / "tmp"
    for directory in (work, temporary):
        directory.mkdir(parents=True)
    out = work / "out"
    began = time.monotonic()
    code, stderr = run(words(out), temporary)
    took = time.monotonic() - began
    assert code == 0, stderr
    expected = left_in(work)
    shutil.rmtree(work)
    work.mkdir()
    wrong: list[str] = []
    stopped, most_left = 0, 0
    resumes = {"out.healing"}
    for moment in range(moments):
        process = start(words(out), temporary)
        time.sleep(IMPORTS + (took - IMPORTS) * moment / moments)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        stopped += process.returncode != 0
        wrong += unforeseen(stderr) + damage(out)
        shutil.rmtree(out, ignore_errors=True)
        for file in ("plan.svg", "plan.json"):
            (work / file).unlink(missing_ok=True)
        left = set(left_in(work)) - resumes
        most_left = max(most_left, len(left))
        if number is not signal.SIGKILL and (left or left_in(temporary)):
            wrong.append(f"left {sorted(left)}, {left_in(temporary)}")
    again = ["--resume"] if name == "heal" and (work / "out.healing").exists() else []
    code, stderr = run([*words(out), *again], temporary)
    wrong += damage(out) + unforeseen(stderr)
    if code or left_in(work) != expected or left_in(temporary):
        wrong.append(f"then: exit code {code}, {left_in(work)}, {left_in(temporary)}, {stderr[-200:]}")
    return {"moments": moments, "stopped": stopped, "most_left_before_the_next_run": most_left, "wrong": wrong}


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def disk(name: str, words: Words, place: Path, *, sizes: int) -> dict[str, Any]:
    """A command on disks of so many sizes, from nothing to what its whole output takes."""
    place.mkdir(parents=True)
    with small_disk(place / "disk", 64 << 20) as there:
        code, stderr = run(words(there / "out"), there)
        assert code == 0, stderr
        needed = sum(path.stat().st_blocks * 512 for path in there.rglob("*") if path.is_file())
    wrong: list[str] = []
    refused = 0
    for step in range(sizes):
        size = max(4096, int(needed * (step + 0.5) / sizes) // 4096 * 4096)
        with small_disk(place / "disk", size) as there:
            code, stderr = run(words(there / "out"), there)
            left = [path for path in left_in(there) if path != "out.healing"]
        errors = stderr.count("error:")
        refused += code != 0
        wrong += unforeseen(stderr)
        if code != 0 and (left or errors != 1):
            wrong.append(f"{size} bytes: left {left}, {errors} errors: {stderr[-300:]}")
    return {"sizes": sizes, "refused": refused, "wrong": wrong}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a command, what it was put through in columns."""
    commands = sorted({name for found in results.values() for name in found})
    rows = [["command", *results], ["-"] * (1 + len(results))]
    for name in commands:
        cells = (found.get(name) for found in results.values())
        rows.append([f"`care {name}`", *("not run" if cell is None else _cell(cell) for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(found: dict[str, Any]) -> str:
    wrong = f"{len(found['wrong'])} wrong" if found["wrong"] else "none wrong"
    tried = (
        f"{found['stopped']} of {found['moments']} stopped"
        if "moments" in found
        else f"{found['refused']} of {found['sizes']} too small"
    )
    return f"{tried}, {wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("signals", "disk", "table"))
    parser.add_argument("--signal", default="SIGKILL", choices=("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"))
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--sizes", type=int, default=8)
    parser.add_argument("--commands", nargs="*", help="default: all that write")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is deaf to it, and so are its children
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    if arguments.what == "table":
        print(table(results))
        return
    title = arguments.signal if arguments.what == "signals" else "full disk"
    with tempfile.TemporaryDirectory() as directory:
        commands = inputs(Path(directory) / "inputs")
        for name in arguments.commands or commands:
            place = Path(directory) / name
            if arguments.what == "signals":
                number = signal.Signals[arguments.signal]
                found = signals(name, commands[name], place, number=number, moments=arguments.moments)
            else:
                found = disk(name, commands[name], place, sizes=arguments.sizes)
            print(title, name, found, flush=True)
            results.setdefault(title, {})[name] = found
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
