"""Timing rounds of all kinds but chains: live rounds of many sizes and plain decoding, all interleaved."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..decoder import Decoder, Round
from ..decoders.autoregressive import AutoregressiveDecoder
from ..decoders.speculative import require_positive
from ..drafts.drafter import ModelDrafter
from ..loading.pair import Pair
from ..models.language_model import LanguageModel
from ..sampling import Sampling
from .host import describe_hardware
from .profile import LatencyProfile, arithmetic_of
from .repeated_rounds import EndlessText, medians, repeating_prompt, rotated, turns
from .round_kinds import DRAFTED

GROWTH = 16
"""Tokens after which a timed text is begun anew."""
_TRIES = 8
_SETTLING = 2
"""Rounds of its own kind before a timed one, as in decoding: right behind another kind it takes a fifth longer."""


def timed_models(pair: Pair, rounds: str) -> Pair:
    """What takes part in rounds of some kind: the pair, or its target without the draft, by the target's name."""
    return pair if rounds in DRAFTED else Pair(pair.target, None, pair.tokenizer, name=pair.target.name)


@dataclass(frozen=True)
class Timing:
    """How rounds are timed.

    Attributes:
        pair: what takes part in the rounds, as `timed_models` has it.
        rounds: the kind, one of `round_kinds` but not `chain`.
        repeats: how often every size is timed, 1 or more.
        prompts: token ids to continue, one prompt a context, the profile's own first.
        sampling: drawing tokens costs more than taking the likeliest.
        time_limit: seconds after which fewer repeats have to do, but at least 3.
    """

    pair: Pair
    rounds: str
    repeats: int
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    time_limit: float

    @classmethod
    def of(
        cls,
        pair: Pair,
        rounds: str,
        *,
        repeats: int,
        prompt: Sequence[int] | None,
        sampling: Sampling,
        time_limit: float,
        contexts: Sequence[int],
    ) -> Timing:
        """Of a pair whose draft, if it has one, is used only where rounds of this kind need it.

        Args:
            prompt: token ids to continue; None for some of which nothing is known.
            contexts: tokens read before, each 1 or more, besides the prompt's own length. They are timed by live
                rounds too, after a text of that length.

        Raises:
            ValueError: a context is not positive, or the prompt cannot be read.
        """
        pair = timed_models(pair, rounds)
        for context in contexts:
            require_positive("each of contexts", context)
        own = repeating_prompt(pair) if prompt is None else AutoregressiveDecoder(pair).check_prompt(prompt)
        lengths = [len(own), *sorted({*map(int, contexts)} - {len(own)})]
        prompts = [(own * (length // len(own) + 1))[:length] for length in lengths]
        return cls(pair, rounds, repeats, prompts, sampling, time_limit)

    @property
    def room(self) -> int:
        """Tokens that may follow one another behind the longest context, at the end of a text."""
        return self._shortest.context_limit - max(map(len, self.prompts)) - GROWTH

    @property
    def _shortest(self) -> LanguageModel:
        """Of the models that take part the one with the shortest context."""
        draft = self.pair.draft
        models = [self.pair.target, *([draft.model] if isinstance(draft, ModelDrafter) else [])]
        return min(models, key=lambda model: model.context_limit)

    def require_room(self, tokens: int) -> None:
        """Raise ValueError unless so many tokens may follow one another behind the longest context."""
        if self.room < tokens:
            name, limit = self._shortest.name, self._shortest.context_limit
            raise ValueError(
                f"a context of {max(map(len, self.prompts))} tokens leaves {name}, whose context is {limit}, no room "
                f"for {self.rounds} rounds to be timed, which takes {GROWTH + tokens} tokens; give a shorter prompt or "
                "shorter contexts"
            )

    def measure(
        self,
        decoder: Decoder,
        sizes: Sequence[int],
        knobs: Callable[[int], Mapping[str, float]],
        *,
        drafting: Collection[int] | None,
        about: Mapping[str, object] | None = None,
    ) -> LatencyProfile:
        """Time the rounds, and plain decoding beside them.

        Args:
            decoder: of the rounds.
            sizes: tokens that the target's pass reads.
            knobs: of a round that reads so many tokens.
            drafting: the sizes of the rounds whose drafting is timed, by `Round.draft_steps`; None where drafting is
                part of the pass.
            about: what the profile tells of the decoder, beside the hardware.
        """
        plain_decoder = AutoregressiveDecoder(self.pair)
        samples = [_Samples() for _ in self.prompts]
        texts = [
            tuple(EndlessText(each, prompt, self.sampling, growth=GROWTH) for each in (decoder, plain_decoder))
            for prompt in self.prompts
        ]
        for turn, counts in turns(self.repeats, self.time_limit):
            for (text, plain), own in zip(texts, samples, strict=True):
                text.restart()
                plain.restart()
                for size in rotated(sizes, turn):
                    for _ in range(_SETTLING):
                        text.step(knobs(size))
                    cycle = _round_of(text, size, knobs(size))
                    for _ in range(_SETTLING):
                        plain.step()
                    plainly = plain.step()
                    if counts:
                        own.add(cycle, plainly, drafting)
        found = [self._profile(own, len(prompt), about) for own, prompt in zip(samples, self.prompts, strict=True)]
        return replace(found[0], points=tuple(found[1:]))

    def _profile(self, samples: _Samples, context: int, about: Mapping[str, object] | None) -> LatencyProfile:
        return LatencyProfile(
            pair=self.pair.name,
            draft_seconds=medians(samples.draft) if samples.draft else {0: 0.0},
            target_seconds=medians(samples.target),
            autoregressive_seconds=statistics.median(samples.plain),
            hardware={**describe_hardware(self.pair), **(about or {})},
            sampling=arithmetic_of(self.sampling),
            rounds=self.rounds,
            batch_size=1,
            context=context,
        )


class _Samples:
    """Seconds as they were measured behind one context: of drafting, of passes by the tokens they read, and plainly."""

    def __init__(self) -> None:
        self.draft: defaultdict[int, list[float]] = defaultdict(list)
        self.target: defaultdict[int, list[float]] = defaultdict(list)
        self.plain: list[float] = []

    def add(self, cycle: Round | None, plainly: Round, drafting: Collection[int] | None) -> None:
        self.plain.append(plainly.verify_seconds)
        if cycle is None:
            return
        if drafting is not None and cycle.target_tokens in drafting:
            self.draft[cycle.draft_steps].append(cycle.draft_seconds)
        apart = 0.0 if drafting is not None else cycle.draft_seconds
        self.target[cycle.target_tokens].append(cycle.verify_seconds + apart)


def _round_of(text: EndlessText, size: int, knobs: Mapping[str, float]) -> Round | None:
    """A round that reads so many tokens; a decoder that has yet to warm up is given some rounds for it."""
    for _ in range(_TRIES):
        cycle = text.step(knobs)
        if cycle.target_tokens == size:
            return cycle
    return None
