"""The agents that tune decoders: the policy, its training (`specgym.agents.training.train`), its export, its judge."""

from .export import ExportedPolicy
from .policy import KnobPolicy
from .settings import TrainSettings
from .tunable import DraftTreeSettings, LookaheadSettings, MedusaSettings, ThresholdSettings

__all__ = [
    "DraftTreeSettings",
    "ExportedPolicy",
    "KnobPolicy",
    "LookaheadSettings",
    "MedusaSettings",
    "ThresholdSettings",
    "TrainSettings",
]
