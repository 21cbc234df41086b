"""Stable-Baselines3 callbacks: what decoding did, whole checkpoints, schedules of learning, and replay."""

from .checkpoints import CheckpointError, FolderCheckpointCallback, intact_checkpoints
from .decoding_metrics import DecodingMetricsCallback
from .divergence_bound import DivergenceBoundCallback
from .early_stop import EarlyStopCallback
from .entropy import EntropyScheduleCallback
from .plateau import PlateauCallback
from .prioritised_replay import PrioritisedReplayCallback, ReplaySettings
from .resumable import Resumable
from .workload_priorities import WorkloadPriorities

__all__ = [
    "CheckpointError",
    "DecodingMetricsCallback",
    "DivergenceBoundCallback",
    "EarlyStopCallback",
    "EntropyScheduleCallback",
    "FolderCheckpointCallback",
    "PlateauCallback",
    "PrioritisedReplayCallback",
    "ReplaySettings",
    "Resumable",
    "WorkloadPriorities",
    "intact_checkpoints",
]
