"""The errors of the fit commands; the command line shows them without a traceback."""

from __future__ import annotations

from ..errors import SpecgymError


class FitError(SpecgymError, ValueError):
    """What was asked for does not fit: the text, the target, or a setting; the message says which and the way out."""


class CorpusError(SpecgymError, RuntimeError):
    """Text cannot be collected; the message says how to get it otherwise."""


class TrainingError(SpecgymError, RuntimeError):
    """Training cannot go on; the message says why and what to try."""
