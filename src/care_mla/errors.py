"""Everything care-mla raises on purpose. A message says where, what was found, what was needed and what to do."""


class ConversionError(Exception):
    """Base of all errors a user can cause or cure; the CLI prints the message alone and exits with 1."""


class ConfigError(ConversionError):
    """An option, or a combination of options, that cannot be carried out."""


class UnsupportedModelError(ConversionError):
    """An architecture, or a feature of one, that no layout here can express."""


class CheckpointError(ConversionError):
    """A checkpoint that cannot be read or written."""


class CalibrationError(ConversionError):
    """Calibration text or statistics that cannot be used."""


class NumericalError(ConversionError):
    """A factorization that the given statistics do not determine."""


class RankError(ConversionError):
    """A rank or cache budget out of range."""


class HealingError(ConversionError):
    """A training run that cannot start or cannot go on."""
