from .checkpoints import Checkpoint, CheckpointError, FolderCheckpointCallback, Resumable, intact_checkpoints
from .metrics import LEFT_OUT, DecodingMetricsCallback, NumericsCallback
from .replay.prioritised import PrioritisedReplayCallback
from .replay.settings import ReplaySettings
from .schedules import EarlyStopCallback, EntropyScheduleCallback, PlateauCallback
from .workloads import DivergenceBoundCallback, RateCallback, WorkloadPriorities

__all__ = [
    "LEFT_OUT",
    "Checkpoint",
    "CheckpointError",
    "DecodingMetricsCallback",
    "DivergenceBoundCallback",
    "EarlyStopCallback",
    "EntropyScheduleCallback",
    "FolderCheckpointCallback",
    "NumericsCallback",
    "PlateauCallback",
    "PrioritisedReplayCallback",
    "RateCallback",
    "ReplaySettings",
    "Resumable",
    "WorkloadPriorities",
    "intact_checkpoints",
]
