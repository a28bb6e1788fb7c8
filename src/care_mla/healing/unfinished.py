"""The directory of a run that is not done: what is in it, whose it is, and when a command may go on with it.

It lies beside the output, as OUT.healing. `care heal` begins one and goes on with --resume; `care convert --heal-tokens` begins
one with the conversion in it, and the same command goes on. Neither touches the other's.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from care_mla.checkpoint import Kind
from care_mla.checkpoint.outputs import Inputs, mark, remove, require_apart, require_replaceable
from care_mla.config import HealSettings
from care_mla.errors import HealingError
from care_mla.files import read_json, write_json, writing
from care_mla.records.artifacts import MANIFEST, METRICS

if TYPE_CHECKING:
    from care_mla.healing.pair import Pair

_OPTION = "the run's state"
_log = logging.getLogger("care_mla")


@dataclass(frozen=True)
class Start:
    """What a run was started with; it goes on with the same alone.

    Attributes:
        settings: `HealSettings`, all of them.
        model, teacher: fingerprints of the weights.
        teacher_name: directory or hub id.
    """

    settings: dict[str, Any]
    model: str
    teacher: str
    teacher_name: str

    @classmethod
    def of(cls, pair: Pair, settings: HealSettings) -> Start:
        return cls(
            settings.model_dump(mode="json"), pair.reader.fingerprint, pair.teacher.fingerprint, pair.teacher_name
        )


class UnfinishedRun:
    """The directory of a run toward an output, whether it is there yet or not.

    Attributes:
        blocks: the training text.
        scales: of the coordinates, see `preconditioning`.
        metrics: a line a step and one an evaluation.
        one_shot: the conversion that `care convert --heal-tokens` heals.
    """

    def __init__(self, out: Path):
        self.directory = out.with_name(f"{out.name}.healing")
        self.blocks = self.directory / "blocks.safetensors"
        self.scales = self.directory / "scales.safetensors"
        self.metrics = self.directory / METRICS
        self.one_shot = self.directory / "one-shot"
        self._started_with = self.directory / "settings.json"
        self._request = self.directory / "request.json"

    @property
    def _files(self) -> list[str]:
        """What may be in the directory; with anything else it is not removed."""
        own = [path.name for path in (self._started_with, self.blocks, self.scales, self._request, self.metrics)]
        one_shot = self.one_shot.name
        return [*own, "step-*", "best*", "bad-batch-*", "teacher-*", f"{one_shot}/*", f".{one_shot}.*", ".*.lock"]

    @property
    def has_started(self) -> bool:
        """Whether training has begun, of whichever command."""
        return self._started_with.is_file()

    @property
    def is_of_conversion(self) -> bool:
        """Whether `care convert --heal-tokens` has begun it."""
        return self._request.is_file()

    def require_apart(self, inputs: Inputs) -> None:
        """
        Raises:
            ConfigError: it would hold, be or lie inside an input.
        """
        require_apart(self.directory, inputs, option=_OPTION)

    def remove(self) -> None:
        """With everything in it."""
        remove(self.directory)

    def start(self) -> Start:
        """What the run was started with.

        Raises:
            HealingError: there is none, or it is of another version, whose settings were others.
        """
        if not self.has_started:
            raise HealingError(f"{self.directory} holds no run to resume; start it without --resume")
        if self._is_outdated():
            raise HealingError(
                f"{self.directory} holds an unfinished run of another version of care-mla, which this one cannot go on with; start anew with --overwrite"
            )
        return Start(**read_json(self._started_with))

    # --- `care heal` --------------------------------------------------------------------------------------------------

    def to_resume(self) -> Start:
        """What the run of `care heal` was started with.

        Raises:
            HealingError: see `start`, or `care convert` has begun it and goes on with it.
        """
        if self.is_of_conversion:
            raise HealingError(self._of_another_command())
        return self.start()

    def begin(self, start: Start, *, overwrite: bool) -> None:
        """A new run of `care heal`, in place of an unfinished one where `overwrite`.

        Raises:
            HealingError, CheckpointError: an unfinished run is there, or what is not care's own.
        """
        self._require_none(overwrite)
        self._make()
        write_json(self._started_with, asdict(start))

    def go_on(self, start: Start) -> None:
        """The run that is there; with what it was started with.

        Raises:
            HealingError: it was started with something else.
        """
        before = self.start()
        changed = [key for key, value in start.settings.items() if before.settings[key] != value]
        changed += [key for key in ("model", "teacher") if getattr(before, key) != getattr(start, key)]
        if changed:
            raise HealingError(
                f"the run in {self.directory} was started with another {', '.join(changed)}; resume it without that option, or start anew with --overwrite"
            )

    # --- `care convert --heal-tokens` ---------------------------------------------------------------------------------

    def begin_conversion(self, request: dict[str, Any], *, overwrite: bool) -> None:
        """A new run that begins with a conversion; what the same request has done before is kept.

        Args:
            request: all that was asked for, as JSON.

        Raises:
            HealingError, CheckpointError: another run is there, or what is not care's own.
        """
        if self.directory.exists():
            require_replaceable(self.directory, Kind.HEALING, overwrite=True, option=_OPTION)
            same = self.is_of_conversion and read_json(self._request) == json.loads(json.dumps(request))
            if same and not (overwrite and self._is_outdated()):
                _log.warning("going on with what an earlier call left in %s", self.directory)
                return
            if any(self.directory.iterdir()) and not overwrite:
                raise HealingError(self._of_another_command())
        self._make()
        write_json(self._request, request)

    @property
    def is_converted(self) -> bool:
        """Whether the conversion is done."""
        return (self.one_shot / MANIFEST).is_file()

    def begin_healing(self, start: Start) -> None:
        """The conversion is done and its training begins."""
        write_json(self._started_with, asdict(start))

    # --- both ---------------------------------------------------------------------------------------------------------

    def _is_outdated(self) -> bool:
        """Whether it is of a version of care-mla whose settings were others."""
        if not self.has_started:
            return False
        saved = read_json(self._started_with)
        return (
            saved.keys() != {field.name for field in fields(Start)}
            or saved["settings"].keys() != HealSettings.model_fields.keys()
        )

    def _require_none(self, overwrite: bool) -> None:
        if not self.directory.exists() or not any(self.directory.iterdir()) or overwrite:
            return
        if self.is_of_conversion:
            raise HealingError(self._of_another_command())
        raise HealingError(
            f"{self.directory} holds an unfinished run; go on with --resume, or start anew with --overwrite"
        )

    def _of_another_command(self) -> str:
        return f"{self.directory} holds an unfinished run of another command; go on with that command, choose another --out, or start anew with --overwrite"

    def _make(self) -> None:
        """A new directory, in place of what was there."""
        if self.directory.exists():
            require_replaceable(self.directory, Kind.HEALING, overwrite=True, option=_OPTION)
            remove(self.directory)
        with writing(self.directory):
            self.directory.mkdir(parents=True)
        mark(self.directory, Kind.HEALING, self._files)


def kept_after_interrupt(out: str | Path) -> str:
    """How to go on after an interrupted run toward `out`; empty where nothing is kept."""
    run = UnfinishedRun(Path(out))
    if not run.directory.is_dir():
        return ""
    if run.is_of_conversion:
        what = "the run" if run.has_started else "the conversion"
        return f"{run.directory} holds {what} so far, and the same command goes on with it"
    return f"{run.directory} holds the run so far, and --resume goes on with it"
