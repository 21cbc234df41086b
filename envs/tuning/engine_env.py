"""Environments that tune an engine's own knobs live, by the engine's own clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray

from specgym.decoding import (
    ArgumentError,
    Engine,
    EngineOptions,
    PromptSet,
    Split,
    engine_names,
    load_prompts,
    mapping_of,
    number,
    one_of,
    open_engine,
    sequence_of,
    whole_number,
)

from ..backends.backend import BackendName, Metrics, Number, backend_of
from ..backends.engine import EngineBackend
from ..workloads import constructor
from .env import Array, BackendEnv
from .knob_space import ActionKind, KnobTuning, Start
from .reward import RewardSettings
from .vector_env import BackendVectorEnv

if TYPE_CHECKING:
    from rich.text import Text

SHOWN: Final = ("speedup", "ms_per_token", "draft_acceptance_rate", "mean_acceptance_length", "equal_texts")
"""Entries of `info` that rendering shows."""


class EngineTuning(KnobTuning):
    """Tuning of an engine's knobs, in a single environment or in many that share the engine.

    Attributes:
        engine: at work.
    """

    engine: Engine
    _backend: EngineBackend
    _opened: Engine | None = None
    """The engine, if it is this environment's to close."""
    _closed = False

    def _check_engine(
        self,
        engine: str | Engine | None,
        target: str | Path | None,
        options: EngineOptions | Mapping[str, Any] | None,
        max_new_tokens: int,
        temperature: float,
        unequal_weight: float,
        backend: BackendName | None,
        source: BackendName | None,
    ) -> None:
        """Check arguments before anything is loaded or started."""
        whole_number("max_new_tokens", max_new_tokens, at_least=2)
        self._unequal_weight = number("unequal_weight", unequal_weight, at_least=0)
        if number("temperature", temperature, at_least=0) and self._unequal_weight:
            raise ArgumentError(
                "unequal_weight is for greedy decoding: sampled text may differ and follow the same distribution; "
                "leave it at 0, or the temperature"
            )
        if backend_of(backend, source, "live") != "live":
            raise ArgumentError(
                "backend: an engine is at work, so backend='replay' is for specgym/Speculative-v0, whose "
                "decoder_options={'stop': ...} replay an engine's rule; leave backend out here"
            )
        if engine is None or target is None:
            if not isinstance(engine, Engine):
                raise ArgumentError(
                    f"name an engine ({', '.join(engine_names())}), its target and its draft, as in "
                    "engine='llama.cpp', target='target.gguf', draft='draft.gguf'; or give an Engine"
                )
        elif isinstance(engine, Engine):
            raise ArgumentError("target: an Engine has its models already; give target, draft and options to it")
        else:
            one_of("engine", engine, engine_names())
        self._options = _engine_options(options)

    def _open(
        self,
        engine: str | Engine | None,
        target: str | Path | None,
        draft: str | Path | None,
        sets: Sequence[PromptSet],
        split: Split,
        max_new_tokens: int,
        temperature: float,
    ) -> EngineBackend:
        """Return the backend of an engine, which is opened if it is named; nothing is started yet."""
        if not isinstance(engine, Engine):
            engine = self._opened = open_engine(
                str(engine), str(target), None if draft is None else str(draft), self._options
            )
        self.engine = engine
        if engine.draft is None or not engine.knobs:
            raise ArgumentError(
                f"draft: {engine.name} has nothing to tune without a draft; name a draft model, or 'prompt-lookup' for "
                "copies from the prompt"
            )
        return EngineBackend(engine, sets, split, max_new_tokens, temperature)

    def _values(self, state: NDArray[np.float64]) -> dict[str, Any]:
        values = super()._values(state)
        if state.ndim == 1:
            return self.engine.nearest(values)
        rows = [self.engine.nearest(dict(zip(values, row, strict=True))) for row in zip(*values.values(), strict=True)]
        return {name: np.array([row[name] for row in rows]) for name in values}

    def _judge(
        self, metrics: Metrics[Number], values: Mapping[str, Number], multiplier: Any, workload: Any
    ) -> tuple[Number, dict[str, Any]]:
        total, entries = super()._judge(metrics, values, multiplier, workload)
        equal: Any = np.array([text.equal for text in self._backend.last], np.float64)
        if isinstance(metrics.seconds, np.ndarray):
            equal = equal.reshape(len(metrics.seconds), -1).mean(1) if len(equal) else np.zeros_like(metrics.seconds)
        else:
            equal = float(equal.mean()) if len(equal) else 0.0
        entries["equal_texts"] = equal
        entries["reward/equality"] = 0.0 - self._unequal_weight * (1 - equal)
        return total + entries["reward/equality"], entries

    def _require_open(self) -> None:
        if self._closed:
            raise gymnasium.error.ClosedEnvironmentError(
                "the environment is closed, and its engine stopped; make another"
            )

    def _stop(self) -> None:
        """Stop whatever was started; doing it twice does nothing."""
        self._closed = True
        if hasattr(self, "_backend"):
            self._backend.close()
        if self._opened is not None:
            self._opened.close()


class EngineEnv(EngineTuning, BackendEnv):
    """Tune the speculation settings of an engine that people serve with, on the engine itself.

    ## Description
    An engine (llama.cpp, OpenVINO GenAI, transformers, vLLM) drafts by a few settings of its own. The agent moves them,
    and every step decodes the next prompt, or the next several, plainly and with the setting on the same engine, one
    right after the other and in turns (A B B A), so that a drift of the machine's speed cancels out. Where the engine
    learns from what it has generated, it is restarted before it would see a prompt again. A setting that the engine
    takes and does not follow is an error, not a measurement.

    ## Action space
    `Box(-1, 1, (knobs,), float32)`: how far to move each knob, in units of its scale, as in `specgym.envs.TuningEnv`;
    or with `action="place"` where to put it. The knobs are `Engine.knobs`, in the engine's own terms and order, the
    draft length first: for llama.cpp `n_max`, `n_min` and `p_min`. `docs/engines.md` has the tables; `knobs`, `ranges`
    and `scales` have the numbers of any. Knobs that do not suit each other (`n_min` above `n_max`) are served as the
    nearest that do (`Engine.nearest`), which `info` shows.

    ## Observation space
    `Box(low, high, (knobs,), float32)`: the knobs in their own units. A whole-number knob is a real number here; the
    engine gets the nearest whole number, which is what `info` shows.

    ## Rewards
    The sum of weighted terms, each also in `info`:

    | term       | before its weight                                               | range   | weight           |
    |------------|-----------------------------------------------------------------|---------|------------------|
    | speed      | seconds a token of plain decoding over the setting's            | > 0     | 1                |
    | acceptance | accepted draft tokens over drafted ones; 0 where it has no counts | 0 to 1 | 0.1             |
    | range      | as in `TuningEnv`; 0 for knobs without a preferred range        | 0 to 1  | 0.05             |
    | divergence | 0: an engine does not tell its distributions                    | 0       |                  |
    | equality   | minus the share of texts that differ from the plain ones        | -1 to 0 | `unequal_weight` |

    Times and counts are the engine's; only tokens after the first are timed, so reading the prompt is not charged.
    `info` has the keys of `TuningEnv` at every step and after `reset`, and `equal_texts`: the share of texts equal to
    the engine's plain ones. Greedy text should be equal; where it is not, the setting changes what is served (bfloat16
    and quantised kernels can). Sampled text may differ and be right. `rounds` are the tokens where the engine counts
    none.

    ## Starting state
    Knobs drawn uniformly from their ranges, or the engine's own defaults with `start="default"`.
    `reset(options={"knobs": {...}})` sets some or all, and `options={"prompt": index}` the prompt of the episode. The
    engine starts with the first step.

    ## Episode end
    Never by itself; `gymnasium.make` truncates after 20 steps. `close()` stops all that was started; an engine given as
    an object stays its owner's to close.

    ## Arguments
    Args:
        engine: a name (`specgym.decoding.engine_names` lists them), or an `Engine`.
        target: file or folder of the target, as the engine reads it, or its name at a hub.
        draft: likewise of the draft; `"prompt-lookup"` for copies from the prompt.
        prompts: a set, its name, or a file, as `load_prompts` takes it.
        max_new_tokens: tokens generated of each prompt, at most; at least 2.
        temperature: of sampling; 0 for greedy decoding.
        options: how the engine is run, an `EngineOptions` or its fields as a mapping (interpreter, address, threads).
        ranges: as in `TuningEnv`, like `scales`, `reward`, `start`, `render_mode`, `prompts_per_step` and `action`.
        split: `"train"` or `"test"` prompts.
        unequal_weight: price of text that differs from the plain one, at least 0; only for greedy decoding.
        backend: `"live"`, the only one.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.

    Raises:
        ValueError: an argument is out of range; the message says which. Nothing has been started then.
        EngineError: the engine is not installed; from `step`: it does not start, has died, has failed, or does not
            follow a setting (`SettingIgnoredError`). The next step starts it anew.

    Times are the clock's, so steps are not reproducible; knobs to start from and the order of prompts are.

    ## Version history
    * v0: first version.
    """

    @constructor()
    def __init__(
        self,
        engine: str | Engine | None = None,
        target: str | Path | None = None,
        draft: str | Path | None = None,
        prompts: str | Path | PromptSet = "prose",
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        options: EngineOptions | Mapping[str, Any] | None = None,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        scales: Mapping[str, float] | None = None,
        reward: RewardSettings | Mapping[str, Any] | None = None,
        start: Start = "random",
        split: Split = "train",
        render_mode: Literal["ansi", "human", "rgb_array"] | None = None,
        prompts_per_step: int = 1,
        action: ActionKind = "move",
        unequal_weight: float = 0.0,
        backend: BackendName | None = None,
        source: BackendName | None = None,
    ) -> None:
        self._check(start, action, split, prompts_per_step)
        self._check_render_mode(render_mode)
        self._check_engine(engine, target, options, max_new_tokens, temperature, unequal_weight, backend, source)
        texts = _prompt_set("prompts", prompts, "for several sets use gymnasium.make_vec(..., num_envs=2)")
        try:
            decoding = self._open(engine, target, draft, [texts], split, max_new_tokens, temperature)
            self._set_up_single(decoding, ranges, scales, action, reward)
        except BaseException:
            self._stop()
            raise

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode. Arguments and errors as for `TuningEnv`.

        Raises:
            gymnasium.error.ClosedEnvironmentError: after `close`.
        """
        self._require_open()
        return super().reset(seed=seed, options=options)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move the knobs, and decode the next prompt or prompts plainly and with them. See `TuningEnv`.

        Raises:
            EngineError: the engine does not start, has died, has failed, or does not follow the setting.
        """
        self._require_open()
        return super().step(action)

    def close(self) -> None:
        """Stop everything that was started; closing twice does nothing."""
        self._stop()

    def _text(self, marks: bool = False) -> Text:
        from .render import render_engine_step

        last = self._backend.last[-1] if self._last_info else None
        prompt = "" if last is None else self._backend.texts[last.workload][last.prompt]
        return render_engine_step(
            str(prompt),
            "" if last is None else last.drafted.text,
            title=self.workload.name,
            knobs=self.knob_values(),
            metrics={name: self._last_info[name] for name in SHOWN} if self._last_info else {},
        )


class EngineVectorEnv(EngineTuning, BackendVectorEnv):
    """Many environments of `EngineEnv` that share one engine, and step together.

    The engine serves one setting after another, so n environments take n times as long; they share its plain decoding,
    its memory and its start. Spaces, rewards and infos are those of the single environment, episodes those of
    `TuningVectorEnv`. For an engine each, `gymnasium.make_vec(..., vectorization_mode="sync")`.

    Args:
        num_envs: how many environments.
        engine: as in `EngineEnv`, like `target`, `draft`, `max_new_tokens`, `temperature`, `options`, `ranges`,
            `scales`, `reward`, `start`, `split`, `prompts_per_step`, `action`, `unequal_weight`, `backend`, `source`.
        prompts: one set or several, each a workload.
        weights: how many environments each set gets, in proportion; by default as many as any other.
        max_episode_steps: length of an episode.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.

    Raises:
        ValueError: as for `EngineEnv`; or the numbers of sets, weights and environments do not agree.
        EngineError: as for `EngineEnv`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        engine: str | Engine | None = None,
        target: str | Path | None = None,
        draft: str | Path | None = None,
        prompts: str | Path | PromptSet | Sequence[str | Path | PromptSet] = "prose",
        weights: Sequence[float] | None = None,
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        options: EngineOptions | Mapping[str, Any] | None = None,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        scales: Mapping[str, float] | None = None,
        reward: RewardSettings | Mapping[str, Any] | None = None,
        start: Start = "random",
        split: Split = "train",
        max_episode_steps: int = 20,
        prompts_per_step: int = 1,
        action: ActionKind = "move",
        unequal_weight: float = 0.0,
        backend: BackendName | None = None,
        source: BackendName | None = None,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        one_of("render_mode", render_mode, (None, "rgb_array"))
        self._check(start, action, split, prompts_per_step)
        self._check_counts(num_envs, max_episode_steps)
        self._check_engine(engine, target, options, max_new_tokens, temperature, unequal_weight, backend, source)
        single = isinstance(prompts, str | Path | PromptSet)
        sets = sequence_of("prompts", [prompts] if single else prompts, _prompt_set)
        try:
            decoding = self._open(engine, target, draft, sets, split, max_new_tokens, temperature)
            self._set_up_together(decoding, weights, ranges, scales, action, reward)
        except BaseException:
            self._stop()
            raise

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode of every environment. Arguments and errors as for `TuningVectorEnv`.

        Raises:
            gymnasium.error.ClosedEnvironmentError: after `close`.
        """
        self._require_open()
        return super().reset(seed=seed, options=options)

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Move the knobs of all environments, and decode each one's next prompt or prompts. See `TuningVectorEnv`.

        Raises:
            EngineError: as for `EngineEnv`.
        """
        self._require_open()
        return super().step(actions)

    def close_extras(self, **kwargs: Any) -> None:
        """Stop everything that was started."""
        self._stop()


def _prompt_set(name: str, value: object, hint: str = "") -> PromptSet:
    if isinstance(value, str | Path):
        return load_prompts(str(value))
    if not isinstance(value, PromptSet):
        way_out = f"; {hint}" if hint else ""
        raise ArgumentError(f"{name} must be the name of a set, a file or a PromptSet, got {value!r}{way_out}")
    return value


def _engine_options(options: EngineOptions | Mapping[str, Any] | None) -> EngineOptions | None:
    if options is None or isinstance(options, EngineOptions):
        return options
    fields: dict[str, Any] = dict(mapping_of("options", options))
    known = EngineOptions.__dataclass_fields__
    for name, value in fields.items():
        if name not in known:
            raise ArgumentError(f"options: an engine has no option {name!r}; there are: {', '.join(known)}")
        if name in ("python", "program", "log") and value is not None:
            fields[name] = Path(value)  # of a string, as JSON has it
    return EngineOptions(**fields)
