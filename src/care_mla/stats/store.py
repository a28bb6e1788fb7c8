"""The STATS directory: stats.json with provenance, and one safetensors file a layer, read one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from care_mla.errors import CalibrationError
from care_mla.files import write_json, write_tensors
from care_mla.linalg import PositiveMatrix
from care_mla.stats.fisher import FisherMoments
from care_mla.stats.moments import Moments
from care_mla.stats.normalized import NormalizedStatistics

FORMAT = "care-mla statistics 1"
WINDOWS = "windows.safetensors"


def _layer_file(directory: Path, layer: int) -> Path:
    return directory / f"layer_{layer:04d}.safetensors"


def _fisher_file(directory: Path, layer: int) -> Path:
    return directory / f"fisher_{layer:04d}.safetensors"


def _normalized_fisher_file(directory: Path, layer: int) -> Path:
    return directory / f"normalized_fisher_{layer:04d}.safetensors"


def _normalized_file(directory: Path, layer: int) -> Path:
    return directory / f"normalized_{layer:04d}.safetensors"


@dataclass(frozen=True)
class LayerStatistics:
    """What a method may use of one layer; `fisher` only where it was collected and asked for.

    Attributes:
        eigenpairs: of the gradients' second moment G, where they are known already.
    """

    moments: Moments
    fisher: FisherMoments | None = None
    eigenpairs: tuple[Tensor, Tensor] | None = None

    @cached_property
    def gradients(self) -> PositiveMatrix:
        """G, the second moment of the gradients. Everything that asks for a power of it shares one eigendecomposition."""
        assert self.fisher is not None
        matrix = self.fisher.metric if self.eigenpairs is None else None
        return PositiveMatrix(matrix, name="the Fisher metric G", eigenpairs=self.eigenpairs)

    def carrying(self, B: Tensor) -> LayerStatistics:
        """The statistics of B y, where a latent carries only that part of the outputs; errors of it meet the same gradients."""
        if self.fisher is None:
            return LayerStatistics(self.moments.carrying(B))
        return LayerStatistics(self.moments.carrying(B), self.fisher.carrying(B), self.gradients.eigenpairs)


class StatisticsWriter:
    """Writes a STATS directory (into a staging directory that the caller makes atomic)."""

    def __init__(self, directory: Path):
        self.directory = directory

    def write_layer(self, layer: int, moments: Moments) -> None:
        """One layer's moments."""
        self._write(moments, _layer_file(self.directory, layer))

    def write_fisher(self, layer: int, fisher: FisherMoments) -> None:
        """One layer's Fisher statistics."""
        self._write(fisher, _fisher_file(self.directory, layer))

    def write_normalized_fisher(self, layer: int, fisher: FisherMoments) -> None:
        """The same of normalized keys."""
        self._write(fisher, _normalized_fisher_file(self.directory, layer))

    def write_normalized(self, layer: int, normalized: NormalizedStatistics) -> None:
        """One layer's statistics of normalized queries and keys."""
        self._write(normalized, _normalized_file(self.directory, layer))

    def _write(self, sums: Moments | FisherMoments | NormalizedStatistics, path: Path) -> None:
        write_tensors(path, sums.to_tensors())

    def write_windows(self, windows: dict[str, Tensor]) -> None:
        """The calibration tokens themselves, for the stages that run the text through the model again."""
        write_tensors(self.directory / WINDOWS, windows)

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Provenance: source fingerprint, corpus, token count, versions. Written last."""
        write_json(self.directory / "stats.json", {"format": FORMAT, **metadata})


class StatisticsStore:
    """A finished STATS directory, layer by layer."""

    def __init__(self, directory: Path):
        self.directory = directory
        path = directory / "stats.json"
        if not path.is_file():
            raise CalibrationError(
                f"{directory} holds no statistics (no stats.json); make them with `care calibrate SOURCE --out {directory}`"
            )
        try:
            self.metadata: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{path} is not valid JSON ({error}); run `care calibrate` again") from error
        if self.metadata.get("format") != FORMAT:
            raise CalibrationError(
                f"{path} has format {self.metadata.get('format')!r}, this version reads {FORMAT!r}; run `care calibrate` again"
            )

    @property
    def notes(self) -> list[str]:
        """What the user should know of the text; empty in statistics of earlier versions."""
        return list(self.metadata.get("notes", []))

    def layer(self, layer: int) -> Moments:
        """Moments of one layer.

        Raises:
            CalibrationError: missing or damaged file.
        """
        return Moments.from_tensors(self._load(_layer_file(self.directory, layer), f"statistics of layer {layer}"))

    @property
    def has_fisher(self) -> bool:
        """Whether a backward pass was part of the calibration."""
        return _fisher_file(self.directory, 0).is_file()

    def fisher(self, layer: int) -> FisherMoments:
        """Fisher statistics of one layer.

        Raises:
            CalibrationError: not collected, or a damaged file.
        """
        if not self.has_fisher:
            raise CalibrationError(
                f"{self.directory} holds no Fisher statistics (calibrated with --no-fisher); calibrate again without it, or choose --method care"
            )
        return FisherMoments.from_tensors(
            self._load(_fisher_file(self.directory, layer), f"statistics of layer {layer}")
        )

    @property
    def has_normalized_fisher(self) -> bool:
        """Whether there are Fisher statistics of normalized keys."""
        return _normalized_fisher_file(self.directory, 0).is_file()

    def normalized_fisher(self, layer: int) -> FisherMoments:
        """Fisher statistics of one layer with QK-norm, of [normalized keys ; values].

        Raises:
            CalibrationError: not collected (no backward pass, or statistics of an earlier version), or a damaged file.
        """
        if not self.has_normalized_fisher:
            raise CalibrationError(
                f"{self.directory} holds no Fisher statistics of normalized keys, which layout mla needs with QK-norm; calibrate again "
                "without --no-fisher, or choose --method care"
            )
        return FisherMoments.from_tensors(
            self._load(_normalized_fisher_file(self.directory, layer), f"statistics of layer {layer}")
        )

    def normalized(self, layer: int) -> NormalizedStatistics:
        """Statistics of one layer's normalized queries and keys.

        Raises:
            CalibrationError: not collected, or a damaged file.
        """
        if not _normalized_file(self.directory, 0).is_file():
            raise CalibrationError(
                f"{self.directory} holds no statistics of normalized queries and keys; collect them with `care calibrate --normalized`"
            )
        return NormalizedStatistics.from_tensors(
            self._load(_normalized_file(self.directory, layer), f"normalized statistics of layer {layer}")
        )

    def windows(self) -> dict[str, Tensor]:
        """The calibration tokens, as written.

        Raises:
            CalibrationError: not kept (statistics of an earlier version), or a damaged file.
        """
        return self._load(self.directory / WINDOWS, "the calibration tokens")

    def _load(self, path: Path, what: str) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise CalibrationError(
                f"{what} cannot be read from {path} ({error}); run `care calibrate` again"
            ) from error

    def require_source(self, fingerprint: str, source: str) -> None:
        """Refuse statistics of another model.

        Raises:
            CalibrationError: the fingerprints differ.
        """
        found = self.metadata.get("source_fingerprint")
        if found != fingerprint:
            raise CalibrationError(
                f"{self.directory} was calibrated on another model ({self.metadata.get('source')}, fingerprint {str(found)[:12]}) than "
                f"{source} ({fingerprint[:12]}); run `care calibrate {source}` for this one"
            )
