"""Experiment: learn to tune, by replay, in episodes in which settings are tried one after another on a workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from specgym.callbacks import DivergenceBoundCallback, WorkloadPriorities
from specgym.decoding import file_name, traits_of
from specgym.envs import ContextLayout, KnobMoves, TuningVectorEnv, VectorObserveContext, trace_in

from ..evaluation.comparison import Kind, summary
from ..evaluation.cross_validation import cross_validate
from ..evaluation.heat_map import heat_map
from ..evaluation.live import live_columns
from ..evaluation.replayed import Problem, problems_of
from ..evaluation.results import ResultTable, machine
from ..evaluation.threshold_patterns import patterns
from ..evaluation.threshold_patterns import save as save_patterns
from ..evaluation.transfer_file import save as save_transfer
from ..evaluation.transfer_tables import rendered_summary, rendered_tests, transfer_verdict
from ..evaluation.tuner_table import CAPTION, COLUMNS, TABLE, session, table_rows, verdict
from ..evaluation.universal import losses, universal_setting
from ..export.knob_policy import ExportedPolicy, KnobRange
from ..export.recommend import by_pair, save_knobs
from ..export.recommend_pair import confirm, recommend, rendered, workload_of
from ..policy import KnobPolicy
from ..report.heat_maps import save_heat_maps
from ..training.console import console, quieten
from ..training.nan_guards import FiniteGuard
from ..training.ppo import learn
from ..training.run_folder import LearnedFolder, RunFolder, this_command, torch_threads
from ..training.sb3_vec_env import VectorEnvAdaptor
from ..training.settings_io import SettingsError
from .experiment import Experiment, Learner, PolicyChoice, load_settings
from .learned_tuner import LearnedTuner
from .tune_knobs import knob_policy, knob_verdict
from .tune_unseen_sessions import TuningSessions
from .tune_unseen_settings import TunerSettings


class TuneUnseen(Experiment[TunerSettings]):
    """Learning to tune on recorded workloads."""

    RESULTS = ("knobs.json", "heat_maps.json", "patterns.json", "transfer.json")
    FIGURES = "numbers"

    @classmethod
    def check(cls, settings: TunerSettings) -> None:
        """Raise an error unless every workload has its recordings."""
        problems_of(settings)

    @cached_property
    def problems(self) -> list[Problem]:
        """The workloads as problems to tune."""
        return problems_of(self.settings)

    @cached_property
    def paths(self) -> dict[str, list[dict[str, float]]]:
        """The settings that the learned tuner tries on each workload, the recommended one last."""
        settings, tuner = self.settings, LearnedTuner.load(self.run.path)
        return {
            problem.name: session(tuner, problem, settings.measurements, settings.seed) for problem in self.problems
        }

    def learners(self) -> Sequence[Learner]:
        """One policy."""
        return [Learner(self.settings.seed, self.run.learned())]

    def environments(self, learner: Learner) -> VecEnv:
        """Sessions of tuning on training prompts."""
        best = {}
        with console.status("The best settings on training prompts") as status:
            for problem in self.problems:
                status.update(f"The best settings on training prompts: {problem.name}")
                best[problem.name] = problem.train_grid().best_reward
        return practice(self.settings, best)

    def policy(self, environments: VecEnv) -> PolicyChoice:
        """A Gaussian over places of the knobs."""
        return knob_policy(self.settings.learning, environments)

    def callbacks(self, learner: Learner) -> Sequence[BaseCallback]:
        """The bound on the divergence and priorities of workloads, where they are asked for."""
        return tuner_callbacks(self.settings)

    def export(self, model: PPO, folder: Path) -> None:
        """Write the policy with the ranges of its knobs."""
        exported(model, self.settings).save(folder)

    def conclude(self) -> None:
        """Recommend settings, and make heat maps and patterns."""
        run = self.run
        if all((run.path / name).is_file() for name in self.RESULTS[:3]):
            return
        recommended = {name: path[-1] for name, path in self.paths.items()}
        universal = universal_setting(self.problems)
        save_knobs(
            run.knobs,
            {
                "pairs": by_pair(recommended, LearnedTuner.load(run.path).policy.knobs),
                "workloads": recommended,
                "universal": universal,
                "loss": losses(self.problems, universal),
            },
        )
        maps = [
            heat_map(problem, [problem.default, *self.paths[problem.name]], recommended[problem.name])
            for problem in self.problems
        ]
        save_heat_maps(run.path / "heat_maps.json", maps, this_command())
        save_patterns(run.path, patterns(self.problems))

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Replay held-out prompts with the recommended settings, and with those that need no measurement."""
        settings, problems = self.settings, self.problems
        recommended = {name: path[-1] for name, path in self.paths.items()}
        rows = table_rows(problems, recommended, universal_setting(problems))
        return ResultTable(
            rows,
            TABLE,
            COLUMNS,
            verdict(rows, settings.max_divergence),
            CAPTION,
            {
                **machine(),
                "time is charged by profiles of": sorted({problem.profiled_on for problem in problems}),
            },
            {
                "measurements": settings.measurements,
                "prompts_per_measurement": settings.prompts_per_measurement,
                "tokens": settings.max_new_tokens,
                "intervals": "95 %, bootstrap over held-out prompts",
            },
        )

    def hints(self) -> Sequence[str]:
        """How to use the tuner."""
        return (
            f"For a pair of your own: python evaluate.py {self.run.path} --pair <target>+<draft>.",
            f"On pairs never seen: python evaluate.py {self.run.path} --transfer.",
        )


def practice(settings: TunerSettings, best: Mapping[str, float]) -> VecNormalize:
    """The environments to practise in: training prompts, the decoder's defaults at first, absolute thresholds.

    Args:
        settings: of the run.
        best: the best reward of every workload on its training prompts, by name.
    """
    env = TuningVectorEnv(
        settings.environments,
        workload=settings.workloads,
        weights=settings.weights or None,
        max_new_tokens=settings.max_new_tokens,
        prompts_per_step=settings.prompts_per_measurement,
        reward=settings.reward,
        start="default",
        action="place",
        max_draft_length=settings.max_draft_length,
        recording=[trace_in(settings.recordings, name, "train") for name in settings.workloads],
        max_episode_steps=settings.measurements + 1,  # the last is what the measurements were for
    )
    observed = VectorObserveContext(env, settings.measurements)
    adapted = VectorEnvAdaptor(TuningSessions(observed, best))
    return VecNormalize(VecMonitor(FiniteGuard(adapted)), norm_obs=False, gamma=settings.learning.gamma)


def tuner_callbacks(settings: TunerSettings) -> list[BaseCallback]:
    """Callbacks that the settings ask for beside the schedules."""
    callbacks: list[BaseCallback] = []
    if settings.max_divergence is not None:
        callbacks.append(DivergenceBoundCallback(settings.max_divergence))
    if settings.learning.workload_priorities:
        callbacks.append(WorkloadPriorities())
    return callbacks


def learn_tuner(settings: TunerSettings, folder: LearnedFolder, best: Mapping[str, float]) -> None:
    """Learn a tuner without a run around it, going on from the newest intact checkpoint, and export it.

    Args:
        settings: how.
        folder: where to.
        best: the best reward of every workload on its training prompts, by name.

    Raises:
        TrainingInterruptedError: interrupted by the user.
    """
    model = learn(
        settings,
        folder,
        settings.seed,
        lambda: practice(settings, best),
        lambda environments: knob_policy(settings.learning, environments),
        tuner_callbacks(settings),
        progress_bar=False,
    )
    exported(model, settings).save(folder.path)
    model.save(folder.policy)


def exported(model: PPO, settings: TunerSettings) -> ExportedPolicy:
    """The policy of a trained model, for the knobs that it was trained on."""
    assert isinstance(model.policy, KnobPolicy)
    moves = KnobMoves(traits_of("threshold").knobs_without_pair(max_draft_length=settings.max_draft_length), None, None)
    knobs = []
    for knob in moves.knobs:
        low, high = moves.ranges[knob.name]
        knobs.append(KnobRange(knob.name, low, high, knob.default, high - low, knob.integer))
    return ExportedPolicy.of(model.policy, knobs, ContextLayout(moves.ranges, settings.measurements).names)


def transfer_tuner(folder: Path, kinds: Sequence[Kind], seeds: Sequence[int], jobs: int) -> None:
    """Cross-validate a run's settings, print what came of it, and write ``transfer.json``.

    Args:
        folder: of the run.
        kinds: what to leave out.
        seeds: one training of each fold a seed.
        jobs: trainings at a time.

    Raises:
        RunFileError: the folder is not that of such a run.
        SettingsError: there is nothing to leave out, no seed, or no job.
    """
    quieten()
    if not kinds or not seeds or min(seeds) < 0 or jobs < 1:
        raise SettingsError(
            f"--transfer needs something to leave out, seeds of at least 0 and at least one job, got {tuple(kinds)}, "
            f"{tuple(seeds)} and {jobs}"
        )
    run = RunFolder.existing(folder)
    settings = load_settings(run.settings)
    with torch_threads(settings.threads), console.status("Cross-validation") as status:
        found = cross_validate(
            settings,
            run.path / "folds",
            this_command(),
            kinds,
            seeds,
            jobs=jobs,
            tell=lambda message: status.update(message),
        )
    transfer_path = run.path / "transfer.json"
    save_transfer(transfer_path, found)
    for kind in found.kinds():
        console.print(rendered_summary(summary(found.results(kind)), kind))
        console.print(rendered_tests(found.results(kind), kind))
    console.print(transfer_verdict(found), highlight=False)
    console.print(f"Everything is in {transfer_path}; python evaluate.py {run.path} --report shows it.", soft_wrap=True)


def recommend_for_pair(
    folder: Path, pair: str, prompts: str, temperature: float, measurements: int | None, live: bool
) -> None:
    """Tune a pair with a run's policy, print what to use and what to expect, and store it in the run's folder.

    Args:
        folder: of the run.
        pair: as `load_pair` takes it.
        prompts: as `load_prompts` takes it.
        temperature: of sampling; 0 for greedy decoding.
        measurements: before the recommendation; by default as many as the tuner has learned with.
        live: measure and confirm by decoding, with the clock beside, even where the pair has a shipped trace.

    Raises:
        RunFileError: the run is not finished. Loading errors as for `load_pair` and `load_prompts`.
    """
    quieten()
    run = RunFolder.existing(folder)
    settings = load_settings(run.settings)
    run.learned().require_complete()
    found = workload_of(pair, prompts, temperature)
    place = run.path / "recommendations" / file_name(found.name)
    with torch_threads(settings.threads), console.status(f"Tuning {found}") as status:
        recommendation = recommend(
            settings,
            ExportedPolicy.load(run.path),
            found,
            settings.measurements if measurements is None else measurements,
            live,
            lambda message: status.update(message),
        )
        recommendation.save(place / "recommendation.json", this_command())
        console.print(rendered(recommendation))
        if live:
            status.update(f"Confirming on held-out prompts of {found}")
            rows = confirm(settings, found, recommendation.knobs, place)
            columns, caption = live_columns(rows)
            console.print(
                ResultTable(rows, columns, caption=caption).render(f"Held-out prompts of {found}, decoded live")
            )
            console.print(knob_verdict(rows, max_divergence=settings.max_divergence), highlight=False)
    knobs = ", ".join(f"{name}={value:.3g}" for name, value in recommendation.knobs.items())
    expected = recommendation.expected.values
    console.print(
        f"Recommended for {found}: {knobs}. Expected: {expected['speedup']:.2f} times plain decoding, divergence "
        f"{expected['divergence']:.3f}. Stored in {place / 'recommendation.json'}.",
        highlight=False,
        soft_wrap=True,
    )
    if expected["speedup"] < 1:
        console.print(
            "That is slower than plain decoding: with thresholds this pair does not pay. Try a shorter draft, or "
            "SpeculativeDecoder with a small draft_length.",
            highlight=False,
        )
