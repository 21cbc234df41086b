"""Workloads: a pair, a set of prompts and a sampling setting, which together are one tuning problem.

A workload's name is ``pair/prompts``, greedy, or ``pair/prompts@temperature``: ``tiny/prose``, ``tiny/code@1.0``,
``gpt2-xl+gpt2/lambada``.

Checks of constructor arguments, and their names in earlier versions. A refusal names the argument.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from specgym.decoding import (
    GREEDY,
    HUB_SETS,
    PRESETS,
    ArgumentError,
    PromptSet,
    Sampling,
    SpecgymError,
    Split,
    UnknownPairError,
    check_fields,
    cut_ids,
    decoder_names,
    default_placement,
    default_prompt_tokens,
    encode_once,
    load_prompts,
    must_cut,
    prompt_limit,
    resolve,
    shipped_prompts,
    traits_of,
    whole_number,
)

if TYPE_CHECKING:
    from specgym.decoding import Pair


P = ParamSpec("P")
Self = TypeVar("Self")


def renamed(arguments: Mapping[str, Any], earlier: Mapping[str, str], stacklevel: int = 3) -> dict[str, Any]:
    """Return keyword arguments by their present names, with a DeprecationWarning for every earlier name.

    Args:
        arguments: keyword arguments.
        earlier: present names by earlier ones.
        stacklevel: of the warning.

    Raises:
        TypeError: an argument is given by both names.
    """
    result = dict(arguments)
    for old, new in earlier.items():
        if old not in result:
            continue
        if new in result:
            raise TypeError(f"{old} is an earlier name of {new}; give {new} alone")
        warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=stacklevel)
        result[new] = result.pop(old)
    return result


def constructor(**earlier: str) -> Callable[[Callable[Concatenate[Any, P], None]], Callable[Concatenate[Any, P], None]]:
    """Decorate an environment's `__init__`: accept earlier argument names, and keep the arguments for pickling.

    Args:
        earlier: present names by earlier ones.
    """

    def decorate(init: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
        @functools.wraps(init)
        def wrapper(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
            present = renamed(kwargs, earlier)
            if isinstance(self, EzPickle):
                EzPickle.__init__(self, *args, **present)
            init(self, *args, **present)

        return wrapper

    return decorate


def reset_options(
    options: Mapping[str, Any] | None, known: Sequence[str], earlier: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the options of a reset; raises ValueError for an unknown one, with the list of those there are."""
    present = renamed(options or {}, earlier or {}, stacklevel=4)
    unknown = sorted(set(present) - set(known))
    if unknown:
        raise ArgumentError(f"unknown reset option {unknown[0]!r}; there are: {', '.join(known)}")
    return present


def per_workload(name: str, value: Any, workloads: Sequence[str], shared: bool = False) -> list[Any]:
    """Return an argument's value for every workload, None where there is none.

    Args:
        name: of the argument, for messages.
        value: a single value, a sequence in the order of the workloads, a mapping from their names, or None.
        workloads: their names.
        shared: whether a single value may serve all.

    Raises:
        ValueError: too many or too few values, or a value for a workload that is not there.
    """
    if value is None:
        return [None] * len(workloads)
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - set(workloads))
        if unknown:
            raise ArgumentError(f"{name}: there is no workload {unknown[0]!r}; there are: {', '.join(workloads)}")
        return [value.get(workload) for workload in workloads]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(workloads):
            raise ArgumentError(f"{name}: {len(value)} were given for {len(workloads)} workloads")
        return list(value)
    if len(workloads) > 1 and not shared:
        raise ArgumentError(f"{name}: one was given for {len(workloads)} workloads; give a mapping from their names")
    return [value] * len(workloads)


DEFAULT_WORKLOAD = "tiny/prose"
"""Workload of a decoder that names none."""

SHIPPED_WORKLOADS: tuple[str, ...] = traits_of("speculative").workloads
"""Default workloads of training; all their pairs and prompt sets ship with the package."""


class WorkloadError(SpecgymError, ValueError):
    """Error of a workload that is not known, or cannot be used; the message lists what there is."""


@dataclass(frozen=True)
class TokenPrompts:
    """Prompts as token ids, for pairs without a tokenizer.

    Attributes:
        train: prompts that tuning may see, of at least one id each.
        test: prompts kept for judging.
        name: of the set, in reports.

    Raises:
        WorkloadError: a side has no prompts, or a prompt no tokens.
    """

    train: Sequence[Sequence[int]]
    test: Sequence[Sequence[int]]
    name: str = "ids"

    def __post_init__(self) -> None:
        for side, prompts in (("train", self.train), ("test", self.test)):
            if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
                raise WorkloadError(f"prompt set {self.name!r}: {side} must hold prompts of at least one token each")


@dataclass(frozen=True)
class Workload:
    """Pair x set of prompts x sampling setting.

    Pairs given by name are loaded once a process and shared, and so are prompts once encoded.

    Args:
        pair: a name, as `load_pair` takes it, or a pair in memory.
        prompts: a name or file, as `load_prompts` takes it, a `PromptSet`, or `TokenPrompts`.
        sampling: of tokens; greedy by default.
        name: in reports; by default made from the parts.
        split: prompts in use, ``train`` or ``test``.
        max_prompt_tokens: tokens of a prompt, at most; longer ones are cut, with a warning. None for whole prompts.
            Either way 256 tokens of the target's context, or half of a short one, are left for the text.

    Raises:
        WorkloadError: `split` or `max_prompt_tokens` is out of range.
    """

    pair: str | Pair
    prompts: str | PromptSet | TokenPrompts
    sampling: Sampling = GREEDY
    name: str = ""
    split: Split = "train"
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise WorkloadError(f"a workload's split is 'train' or 'test', got {self.split!r}")
        if self.max_prompt_tokens is not None:
            check_fields(self, functools.partial(whole_number, at_least=2, error=WorkloadError), "max_prompt_tokens")
        if not self.name:
            pair = self.pair if isinstance(self.pair, str) else self.pair.name
            prompts = self.prompts if isinstance(self.prompts, str) else self.prompts.name
            object.__setattr__(self, "name", f"{pair}/{prompts}{suffix_of(self.sampling)}")

    def __str__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: object) -> Workload:
        """Return the workload itself: it never changes, and gymnasium copies arguments that would hold two models."""
        return self

    def with_split(self, split: Split) -> Workload:
        """Return this workload with the prompts of ``train`` or ``test``."""
        return replace(self, split=split)

    def load(self) -> Pair:
        """Return the pair; one that is given by name is loaded once a process. Errors as for `load_pair`."""
        return _shared_pair(self.pair, *default_placement()) if isinstance(self.pair, str) else self.pair

    @property
    def mixed(self) -> bool:
        """True if the pair has several drafts; one that is given by name is not loaded."""
        if isinstance(self.pair, str):
            return len(resolve(self.pair).drafts) > 1
        from specgym.decoding import drafts_of  # which imports torch; a replay needs none

        return len(drafts_of(self.pair.draft)) > 1

    @property
    def prompt_limit(self) -> int | None:
        """Tokens of a prompt, at most, as far as anybody asked for a limit; None for as many as there is room for."""
        return default_prompt_tokens() if self.max_prompt_tokens is None else self.max_prompt_tokens

    def prompt_ids(self, split: Split | None = None) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of every prompt of a split, by default the workload's own.

        A warning says once in a process how many were cut. A text loses its beginning, a message in a chat template its
        middle, ids their beginning; a BOS token and the template stay.

        Raises:
            PromptError: the prompts are texts and the pair has no tokenizer; or as for `specgym.decoding.encode`.
        """
        split = split or self.split
        whole, (limit, why) = self.encoded(split), prompt_limit(self.load(), self.prompt_limit)
        return self.encoded(split, limit) if must_cut(self.name, split, whole, limit, why) else whole

    def prompt_set(self) -> PromptSet | None:
        """Return the prompts as text, with their references; None for token ids. Errors as for `load_prompts`."""
        if isinstance(self.prompts, TokenPrompts):
            return None
        return load_prompts(self.prompts) if isinstance(self.prompts, str) else self.prompts

    def encoded(self, split: Split, limit: int | None = None) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of a split's prompts: whole, or cut to a limit. Errors as for `prompt_ids`."""
        pair, prompts = self.load(), self.prompt_set()
        if prompts is not None:
            return encode_once(pair, prompts, split, limit)
        assert isinstance(self.prompts, TokenPrompts)
        chosen = self.prompts.train if split == "train" else self.prompts.test
        bos = getattr(pair.target.model.config, "bos_token_id", None)
        return tuple(tuple(cut_ids([int(token) for token in ids], limit, int(ids[0] == bos))) for ids in chosen)


def workload(name: str | Workload) -> Workload:
    """Return the workload of a name; a `Workload` is returned as it is.

    Args:
        name: ``pair/prompts`` or ``pair/prompts@temperature``. Nothing is loaded yet.

    Raises:
        WorkloadError: the name does not have that form, or the pair or the prompts are unknown; the message lists
            what there is.
    """
    if isinstance(name, Workload):
        return name
    # Paths may have an @ of their own, so the name is tried as a whole first.
    body, _, temperature = name.rpartition("@")
    if parts := divided(name):
        return Workload(*parts)
    if parts := divided(body):
        try:
            return Workload(*parts, Sampling(temperature=float(temperature)))
        except ValueError as error:
            raise WorkloadError(
                f"workload {name!r}: {temperature!r} after @ is no temperature ({error}); write {body}@1.0, or {body} "
                "for greedy decoding"
            ) from None
    raise WorkloadError(_unknown(name, body if body and "/" not in temperature else name))


def divided(name: str) -> tuple[str, str] | None:
    """Return pair and prompts of a name without a temperature, or None where nothing is known by these names."""
    # Hub ids and files have slashes of their own, so every slash is tried as the one in the middle.
    parts = ((name[:place], name[place + 1 :]) for place, letter in reversed(list(enumerate(name))) if letter == "/")
    return next(((pair, prompts) for pair, prompts in parts if _known_prompts(prompts) and _known_pair(pair)), None)


def default_workload(decoder: str | Callable[..., Any]) -> str:
    """Return the default workload of a decoder, given by its name, its class or a callable that builds one."""
    if isinstance(decoder, str) and decoder not in decoder_names():
        return DEFAULT_WORKLOAD  # whoever builds the decoder refuses the name
    if isinstance(decoder, str | type):
        return traits_of(decoder).workloads[0]
    return DEFAULT_WORKLOAD


def shared_out(environments: int, weights: Sequence[float] | None, workloads: int) -> NDArray[np.int64]:
    """Return the workload of each environment, in proportion to the weights and well mixed; shape (environments,).

    Raises:
        ValueError: the weights are not positive, or not one number a workload, or there are fewer environments than
            workloads.
    """
    shares = np.ones(workloads) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (workloads,) or not (np.isfinite(shares) & (shares > 0)).all():
        raise ArgumentError(f"weights must be {workloads} positive numbers, one for each workload, got {weights}")
    if environments < workloads:
        raise ArgumentError(f"num_envs must be at least {workloads}, one for each workload, got {environments}")
    chosen = np.empty(environments, np.int64)
    counts = np.zeros(workloads)
    for place in range(environments):
        # Always the workload that has waited longest for its next environment.
        chosen[place] = np.argmin((counts + 0.5) / shares)
        counts[chosen[place]] += 1
    return chosen


def probabilities(weights: Sequence[float] | Mapping[str, float], workloads: Sequence[str]) -> NDArray[np.float64]:
    """Return the probability of every workload, in proportion to the weights; shape (workloads,).

    Args:
        weights: in the order of the workloads, or a mapping from their names.
        workloads: their names.

    Raises:
        ValueError: the weights are not one finite number of at least 0 for each workload, or all are 0.
    """
    ordered = per_workload("weights", weights if isinstance(weights, Mapping) else list(weights), workloads)
    shares = np.array([np.nan if share is None else share for share in ordered], np.float64)
    if not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
        raise ArgumentError(
            f"weights must be {len(workloads)} finite numbers of at least 0, one for each workload and not all 0, got "
            f"{weights}"
        )
    return shares / shares.sum()


@functools.cache
def _shared_pair(name: str, dtype: str | None, device: str | None) -> Pair:
    """The pair of a name as this process places its models, which `load_pair` knows itself."""
    from specgym.decoding import load_pair  # which imports torch; a replay needs none

    return load_pair(name)


def _known_pair(name: str) -> bool:
    try:
        resolve(name)
    except UnknownPairError:
        return False
    return True


def _known_prompts(name: str) -> bool:
    return name in shipped_prompts() or name in HUB_SETS or Path(name).expanduser().is_file()


def suffix_of(sampling: Sampling) -> str:
    """Return the end of a workload's name, which says how it samples; empty where it is greedy."""
    if sampling.greedy:
        return ""
    top_k = f",top_k={sampling.top_k}" if sampling.top_k else ""
    top_p = f",top_p={sampling.top_p:g}" if sampling.top_p < 1 else ""
    return f"@{float(sampling.temperature)}{top_k}{top_p}"


def _unknown(name: str, body: str) -> str:
    pair, _, prompts = body.rpartition("/")
    if not _known_prompts(prompts):  # which may be a file that is missing, whose path has slashes of its own
        slashes = [place for place, letter in enumerate(body) if letter == "/" and body[place - 1 : place] != "/"]
        known = [place for place in slashes if _known_pair(body[:place])]
        pair, prompts = (body[: known[-1]], body[known[-1] + 1 :]) if known else (pair, prompts)
    if pair and _known_prompts(prompts):
        wrong = f"there is no pair {pair!r}"
        close = difflib.get_close_matches(pair, PRESETS, n=1)
    elif pair and _known_pair(pair):
        wrong = f"there are no prompts {prompts!r}"
        close = difflib.get_close_matches(prompts, [*shipped_prompts(), *HUB_SETS], n=1)
    else:
        wrong = "it is not of the form pair/prompts or pair/prompts@temperature"
        close = difflib.get_close_matches(name, SHIPPED_WORKLOADS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"no workload {name!r}: {wrong}.{hint} Pairs: {', '.join(PRESETS)}, target+draft, or a target alone (a folder "
        f"or owner/model). Prompts: {', '.join([*shipped_prompts(), *HUB_SETS])}, or a file."
    )
