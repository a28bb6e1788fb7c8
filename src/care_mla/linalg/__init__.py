"""Dense symmetric linear algebra: damping, powers, spectra, truncation. float64, torch only."""

from care_mla.linalg.damping import shrink, shrink_to_isotropic
from care_mla.linalg.powers import symmetric_power
from care_mla.linalg.spectrum import Factors, Spectrum, decompose, truncate

__all__ = ["Factors", "Spectrum", "decompose", "shrink", "shrink_to_isotropic", "symmetric_power", "truncate"]
