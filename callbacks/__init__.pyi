from .checkpoints import Checkpoint, CheckpointError, FolderCheckpointCallback, Resumable, intact_checkpoints
from .divergence_bound import DivergenceBoundCallback
from .metrics import LEFT_OUT, DecodingMetricsCallback
from .numerics import NumericsCallback
from .rate import RateCallback
from .replay.prioritised import PrioritisedReplayCallback
from .replay.settings import ReplaySettings
from .schedules import EarlyStopCallback, EntropyScheduleCallback, PlateauCallback
from .workload_priorities import WorkloadPriorities

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
