from .command_line import evaluate_command, train_command
from .engines.command import tune_engine
from .engines.settings import EngineSettings
from .evaluation.contenders import TrainingReplay, contenders, fixed_length
from .evaluation.live import Contender, judge_live, reward_of, whole_numbers
from .evaluation.results import Column, ResultTable, Row
from .evaluation.statistics import (
    holm,
    interval,
    losses,
    rank_correlation,
    resampled_means,
    sign_flip_test,
    universal_setting,
)
from .evaluation.text_quality import TextQuality, TextQualityError, require_measure, text_quality
from .evaluation.unseen.comparison import recommendations
from .evaluation.unseen.cross_validation import Training, train_fold
from .evaluation.unseen.transfer import Transfer
from .evaluation.worlds.methods import ClosedForm, Learned
from .evaluation.worlds.transfer import WorldsTransfer
from .experiments.control.choice_policy import ChoicePolicy
from .experiments.control.choose_drafts_settings import ChoiceSettings
from .experiments.control.round_knobs_settings import RoundKnobSettings
from .experiments.control.stop_drafts_settings import StopSettings
from .experiments.control.stop_policy import StoppingPolicy
from .experiments.experiment import (
    Experiment,
    KnobLearning,
    LearningSettings,
    RunSettings,
    load_settings,
    save_settings,
)
from .experiments.learned_tuner import LearnedSearcher, LearnedTuner, tasks_of
from .experiments.tune_knobs import TuneKnobs
from .experiments.tune_knobs_settings import EnvironmentSettings, EvaluationSettings, KnobSettings, default_settings
from .experiments.tune_unseen_settings import TunerSettings, tuner_settings
from .experiments.tune_worlds import TuneWorlds
from .experiments.tune_worlds_settings import WorldsSettings
from .export.choice_rule import ExportedChoiceRule
from .export.knob_policy import ExportedKnobRule, ExportedPolicy, KnobRange
from .export.recommend import Recommendation, fastest_within, load_knobs, settle
from .export.recommend_exact import play, usual_setting
from .export.stop_rule import ExportedStopRule
from .export.worlds_policy import SHIPPED_TUNER, WorldsTuner, shipped_tuner
from .policy import KnobPolicy
from .training.environments import recording_path, training_environments
from .training.ppo import learn
from .training.run import evaluate, train
from .training.run_folder import RunFolder, quieten, read_json, this_command
from .training.settings_io import SettingsError

__all__ = [
    "SHIPPED_TUNER",
    "ChoicePolicy",
    "ChoiceSettings",
    "ClosedForm",
    "Column",
    "Contender",
    "EngineSettings",
    "EnvironmentSettings",
    "EvaluationSettings",
    "Experiment",
    "ExportedChoiceRule",
    "ExportedKnobRule",
    "ExportedPolicy",
    "ExportedStopRule",
    "KnobLearning",
    "KnobPolicy",
    "KnobRange",
    "KnobSettings",
    "Learned",
    "LearnedSearcher",
    "LearnedTuner",
    "LearningSettings",
    "Recommendation",
    "ResultTable",
    "RoundKnobSettings",
    "Row",
    "RunFolder",
    "RunSettings",
    "SettingsError",
    "StopSettings",
    "StoppingPolicy",
    "TextQuality",
    "TextQualityError",
    "Training",
    "TrainingReplay",
    "Transfer",
    "TuneKnobs",
    "TuneWorlds",
    "TunerSettings",
    "WorldsSettings",
    "WorldsTransfer",
    "WorldsTuner",
    "contenders",
    "default_settings",
    "evaluate",
    "evaluate_command",
    "fastest_within",
    "fixed_length",
    "holm",
    "interval",
    "judge_live",
    "learn",
    "load_knobs",
    "load_settings",
    "losses",
    "play",
    "quieten",
    "rank_correlation",
    "read_json",
    "recommendations",
    "recording_path",
    "require_measure",
    "resampled_means",
    "reward_of",
    "save_settings",
    "settle",
    "shipped_tuner",
    "sign_flip_test",
    "tasks_of",
    "text_quality",
    "this_command",
    "train",
    "train_command",
    "train_fold",
    "training_environments",
    "tune_engine",
    "tuner_settings",
    "universal_setting",
    "usual_setting",
    "whole_numbers",
]
