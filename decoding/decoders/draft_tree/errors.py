"""The error of what guides the growth of draft trees."""

from __future__ import annotations

from ...errors import SpecgymError


class DraftTreeModelError(SpecgymError, ValueError):
    """An alignment or acceptance predictor that cannot be used; the message names it and the way out."""


class OtherModelsError(DraftTreeModelError):
    """It is whole, and was made for other models."""
