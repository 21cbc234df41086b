from .command_line import evaluate_command, train_command
from .evaluation.comparison import recommendations
from .evaluation.cross_validation import Training, train_fold
from .evaluation.live import Row, evaluate, reward_of, whole_numbers
from .evaluation.statistics import holm, interval, resampled_means, sign_flip_test
from .evaluation.transfer_file import read
from .evaluation.tuner_table import session
from .evaluation.universal import losses, universal_setting
from .experiments.learned_tuner import LearnedSearcher, LearnedTuner
from .experiments.settings import EvaluationSettings, LearningSettings, TrainSettings
from .experiments.stop_drafts_policy import StoppingPolicy
from .experiments.tune_knobs import (
    DraftTreeSettings,
    LookaheadSettings,
    MedusaSettings,
    ThresholdEnvironment,
    ThresholdSettings,
    load_settings,
)
from .experiments.tune_unseen import TunerSettings
from .export.knob_policy import ExportedPolicy, KnobRange
from .export.recommend import load_knobs
from .export.stop_rule import ExportedStopRule
from .policy import KnobPolicy
from .training.beginning import this_command
from .training.console import quieten
from .training.environments import recording_path, training_environments
from .training.files import read_json
from .training.run_folder import RunFolder
from .training.settings_checks import SettingsError
from .training.tuner_run import problems_of

__all__ = [
    "DraftTreeSettings",
    "EvaluationSettings",
    "ExportedPolicy",
    "ExportedStopRule",
    "KnobPolicy",
    "KnobRange",
    "LearnedSearcher",
    "LearnedTuner",
    "LearningSettings",
    "LookaheadSettings",
    "MedusaSettings",
    "Row",
    "RunFolder",
    "SettingsError",
    "StoppingPolicy",
    "ThresholdEnvironment",
    "ThresholdSettings",
    "TrainSettings",
    "Training",
    "TunerSettings",
    "evaluate",
    "evaluate_command",
    "holm",
    "interval",
    "load_knobs",
    "load_settings",
    "losses",
    "problems_of",
    "quieten",
    "read",
    "read_json",
    "recommendations",
    "recording_path",
    "resampled_means",
    "reward_of",
    "session",
    "sign_flip_test",
    "this_command",
    "train_command",
    "train_fold",
    "training_environments",
    "universal_setting",
    "whole_numbers",
]
