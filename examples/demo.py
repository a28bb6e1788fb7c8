"""`make demo`: convert SmolLM2-135M-Instruct at 50% KV saving and measure what it cost. No data set, no hub.

Calibration and evaluation text are two halves of the documentation that every Python carries (pydoc_data.topics).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from pydoc_data.topics import topics

from rich.console import Console

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.cli.convert import show_conversion
from care_mla.cli.evaluate import evaluation_table
from care_mla.progress import rich_track


def write_texts(directory: Path) -> tuple[Path, Path]:
    """Calibration and evaluation text: topics alternate, so both cover all of the language."""
    directory.mkdir(parents=True, exist_ok=True)
    ordered = [topics[name] for name in sorted(topics)]
    calibration, evaluation = directory / "calibration.txt", directory / "evaluation.txt"
    calibration.write_text("\n\n".join(ordered[0::2]), encoding="utf-8")
    evaluation.write_text("\n\n".join(ordered[1::2]), encoding="utf-8")
    return calibration, evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="HF directory of the source model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kv-save", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()

    quiet_libraries()
    calibration, evaluation = write_texts(arguments.out)
    converted = arguments.out / "smollm2-135m-mla"
    manifest = care_mla.convert(
        arguments.model,
        converted,
        kv_save=arguments.kv_save,
        calibration={"calibration": str(calibration), "samples": arguments.samples},
        overwrite=True,
        track=rich_track,
    )
    show_conversion(manifest, converted)
    result = care_mla.evaluate(converted, str(evaluation), reference=arguments.model, track=rich_track)
    console = Console()
    console.print(evaluation_table(result, title="Held-out half of the Python documentation, 8 x 512 tokens"))
    report = shutil.copyfile(care_mla.write_report(converted), arguments.out / "report.html")
    console.print(f"Model: {converted}\nReport: {report}")


if __name__ == "__main__":
    main()
