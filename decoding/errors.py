"""The errors of this package. Each names the thing that is wrong and the way out."""

from __future__ import annotations

import math


class SpecgymError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedModelError(SpecgymError, TypeError):
    """A model that cannot be decoded speculatively, for instance one without a croppable key/value cache."""


class VocabularyMismatchError(SpecgymError, ValueError):
    """A target and a draft that do not number the same tokens in the same way."""


class PromptError(SpecgymError, ValueError):
    """A prompt that is empty, too long for the model, or holds ids outside the vocabulary."""


class KnobError(SpecgymError, ValueError):
    """A knob that the decoder does not have, or a value outside its range."""


class NumericalError(SpecgymError, ArithmeticError):
    """A model that produced NaN where probabilities were needed."""


class FitError(SpecgymError, ValueError):
    """A setting of a fit command, its text or its target does not fit; the message says which and the way out."""


class TrainingError(SpecgymError, RuntimeError):
    """Training cannot go on; the message says why and what to try."""


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless a length or a count is a positive whole number."""
    if not (math.isfinite(value) and value >= 1 and int(value) == value):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
