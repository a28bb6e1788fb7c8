"""Dense symmetric linear algebra: damping, powers, spectra, truncation, refits. float64, torch only."""

from care_mla.linalg.damping import shrink, shrink_to_isotropic
from care_mla.linalg.powers import PositiveMatrix
from care_mla.linalg.regression import ridge_refit
from care_mla.linalg.solvers import positive_inverse, solve, symmetric_eigen
from care_mla.linalg.spectrum import Factors, Spectrum, decompose, truncate

__all__ = [
    "Factors",
    "PositiveMatrix",
    "Spectrum",
    "decompose",
    "positive_inverse",
    "ridge_refit",
    "shrink",
    "shrink_to_isotropic",
    "solve",
    "symmetric_eigen",
    "truncate",
]
