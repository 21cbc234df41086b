"""Learning when to stop a draft: training by replay, the rules it must beat, and a rule to decode with live."""

from .export import ExportedStopRule
from .settings import StoppingSettings

__all__ = ["ExportedStopRule", "StoppingSettings"]
