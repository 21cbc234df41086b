"""Live backends: decoding with the models, charged by a latency profile or by the clock; and its summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from specgym.decoding import (
    GREEDY,
    ArgumentError,
    AutoregressiveDecoder,
    Decoder,
    Generation,
    LatencyProfile,
    Pair,
    Round,
    Sampling,
    Split,
    TextRequest,
    build_decoder,
    generate_texts,
    measured,
    traits_of,
)

from ..profiles import Profiles, profile_of
from ..workloads import default_workload, per_workload
from ..workloads import workload as named_workload
from .backend import Floats, Integers, Metrics
from .replay import Workloads, asked


class LiveBackend:
    """Decoders at work on the pairs of some workloads. See `Backend`.

    Args:
        decoder: a name or a callable, as `build_decoder` takes it.
        workload: workloads or their names; by default the decoder's own.
        split: of the prompts; by default each workload's own.
        max_new_tokens: tokens generated of each prompt, at most.
        options: build options, for a decoder given by name.
        max_draft_length: one of them, for those that have it.
        profile: of the workloads.
        batch_size: of the operating point.
        context: of the operating point.
        wall: whether the clock is charged instead of the profile, and texts are decoded one after another, not in a
            batch; plain decoding's time stays the profile's.
    """

    def __init__(
        self,
        decoder: str | Callable[[Pair], Decoder[Any]],
        workload: Workloads,
        split: Split | None,
        max_new_tokens: int,
        options: Mapping[str, Any] | None,
        max_draft_length: int,
        profile: Profiles,
        batch_size: int,
        context: int | None,
        wall: bool,
    ) -> None:
        options = dict(options or {})
        if isinstance(decoder, str):
            options = traits_of(decoder).accepted_options(max_draft_length=max_draft_length) | options
        several = [named_workload(name or default_workload(decoder)) for name in asked(workload, None)]
        self.workloads = [named if split is None else named.with_split(split) for named in several]
        self.decoders = [build_decoder(decoder, named.load(), **options) for named in self.workloads]
        self.decoder = self.decoders[0]
        self.knobs = self.decoder.knobs
        for named, built in zip(self.workloads, self.decoders, strict=True):
            if built.knobs != self.knobs:
                raise ArgumentError(
                    f"{named} gives the decoder other knobs than {self.workloads[0]}: environments that step together "
                    "have the same; make one for each"
                )
        names = [named.name for named in self.workloads]
        charges = per_workload("profile", profile, names, shared=True)
        self.profiles = []
        for named, built, value in zip(self.workloads, self.decoders, charges, strict=True):
            charged = profile_of(named, value, replayed=False, decoder=built)
            self.profiles.append(charged.at(batch_size=batch_size, context=context))
            built.charge_by(self.profiles[-1])
        self._texts: list[Sequence[int]] = []
        self.prompts: list[Integers] = []
        for named in self.workloads:
            texts = list(named.prompt_ids())
            self.prompts.append(len(self._texts) + np.arange(len(texts)))
            self._texts += texts
        self._count = len(self._texts)
        self._max_new_tokens = max_new_tokens
        self._wall = wall
        self._last: tuple[Sequence[int], list[Round]] = (), []
        self._rehearses = False

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Draw inside what decoding draws, and decode nothing; all metrics are 1."""
        self._rehearses = True
        try:
            yield
        finally:
            self._rehearses = False

    def choose(self, prompt: Any, workload: int = 0) -> int:
        """Return the number of a prompt given by its index, as token ids or as a string."""
        numbers = self.prompts[workload]
        if isinstance(prompt, int | np.integer):
            if not 0 <= prompt < len(numbers):
                named = self.workloads[workload]
                raise ArgumentError(
                    f"reset option prompt={prompt}: {named} has {named.split} prompts 0 to {len(numbers) - 1}"
                )
            return int(numbers[prompt])
        try:
            ids = tuple(self.decoders[workload].check_prompt(prompt))
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"reset option prompt (an index, token ids or a string): {error}") from error
        self._texts[self._count :] = [ids]  # in place of another that was chosen before
        return self._count

    def decode(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> Metrics[Floats]:
        """Decode n texts in one batch; they get one seed, counted upwards."""
        seed = int(rng.integers(2**31))
        if self._rehearses:
            return Metrics(*np.ones((len(Metrics._fields), len(prompts))))
        requests = [
            TextRequest(
                self.decoders[workload],
                self._texts[number],
                self._max_new_tokens,
                self.workloads[workload].sampling,
                seed + place,
                {name: float(values[place]) for name, values in knobs.items()},
            )
            for place, (number, workload) in enumerate(zip(prompts.tolist(), workloads.tolist(), strict=True))
        ]
        generations = generate_texts(requests, batch_size=1 if self._wall else None)
        self._last = requests[-1].prompt_ids, generations[-1].rounds
        metrics = []
        for generation, workload in zip(generations, workloads.tolist(), strict=True):
            charged = metrics_of([generation], self.profiles[workload])
            metrics.append(charged._replace(seconds=generation.seconds) if self._wall else charged)
        return Metrics(*np.array(metrics).T)

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Accept all: the decoder takes whatever its knobs allow."""

    def last_text(self) -> tuple[Sequence[int], list[Round]]:
        """Return prompt and rounds of the text decoded last."""
        return self._last


def measure_setting(
    decoder: Decoder[Any],
    knobs: Mapping[str, float] | None,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    profile: LatencyProfile | None = None,
) -> dict[str, float]:
    """Decode some prompts with one setting, and return `summarise`'s metrics.

    Args:
        decoder: an algorithm with its pair.
        knobs: values by name; the decoder's defaults for those left out.
        prompts: token ids, one sequence a prompt, at least one.
        tokens: to generate for each prompt, at most.
        sampling: how tokens are chosen.
        seed: fixes every random choice; the prompts get `seed`, `seed + 1`, ...
        profile: what time is charged by; by default the pair's own on this hardware, measured once.

    Raises:
        ValueError: there is no prompt. Otherwise as for `Decoder.generate`.
    """
    if profile is None:
        profile = measured(decoder.pair, decoder, sampling=sampling)
    return summarise(decoder, decode_prompts(decoder, knobs, prompts, tokens, sampling, seed), profile)


def decode_prompts(
    decoder: Decoder[Any],
    knobs: Mapping[str, float] | None,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
) -> list[Generation]:
    """Return one generation a prompt, in order. Arguments and errors as for `measure_setting`."""
    if not prompts:
        raise ArgumentError("there is nothing to measure: give at least one prompt")
    return [
        decoder.generate(
            prompt,
            max_new_tokens=tokens,
            sampling=sampling,
            seed=None if seed is None else seed + place,
            knobs=knobs,
        )
        for place, prompt in enumerate(prompts)
    ]


def metrics_of(generations: Sequence[Generation], profile: LatencyProfile, plain: bool = False) -> Metrics[float]:
    """Return the metrics of some generations together.

    Args:
        generations: at least one.
        profile: what rounds are charged by.
        plain: whether they are of plain decoding, which verifies nothing, so that a round of it is cheaper than a
            round with an empty draft.
    """
    rounds = [round_ for generation in generations for round_ in generation.rounds]
    tokens = sum(len(generation.tokens) for generation in generations)
    plain_seconds = profile.autoregressive_seconds * tokens
    return Metrics(
        tokens=float(tokens),
        rounds=float(len(rounds)),
        drafted=float(sum(round_.drafted for round_ in rounds)),
        accepted=float(sum(round_.accepted for round_ in rounds)),
        total_variation=float(sum(round_.divergence for round_ in rounds)),
        seconds=plain_seconds if plain else profile.charge(rounds),
        plain_seconds=plain_seconds,
    )


def summarise(decoder: Decoder[Any], generations: Sequence[Generation], profile: LatencyProfile) -> dict[str, float]:
    """Return metrics of some generations together. Rates are ratios of sums, so that a long text counts for more.

    Returns:
        `Metrics.entries`, and `wall_ms_per_token` and `wall_seconds` by the clock. Reading the prompts is in none of
        them.
    """
    metrics = metrics_of(generations, profile, plain=isinstance(decoder, AutoregressiveDecoder))
    wall_seconds = sum(generation.seconds for generation in generations)
    return {
        **metrics.entries(),
        "wall_ms_per_token": 1000 * wall_seconds / metrics.tokens,
        "wall_seconds": wall_seconds,
    }
