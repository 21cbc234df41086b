"""Plain decoding, one token a pass: the baseline of every speedup.

Side-by-side decoding: several decoders take turns on the same prompts, so that all meet the same machine.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from ..decoder import GREEDY, Decoder, Session
from ..models.captured import NEVER
from ..rounds import Generation, Round
from ..sampling import Sampling, draw


class AutoregressiveSession(Session["AutoregressiveDecoder"]):
    """One prompt being generated token by token."""

    def _round(self, knobs: Mapping[str, float]) -> Round:
        started = time.perf_counter()
        pending = torch.tensor(self.context[-1:], device=self.target.device)
        scores = self.target.forward(pending, last=1).scores
        if self.sampling.greedy:
            choice = scores.argmax(-1)
        else:
            choice = draw(self.sampling.probabilities(scores), self.generator)
        token, greatest = torch.cat([choice.float(), scores.amax(-1)]).tolist()  # the round's only wait for the device
        self._refuse_broken(greatest)
        self._emit([int(token)])
        return Round((int(token),), 0, 0, 0.0, 0.0, time.perf_counter() - started)


class AutoregressiveDecoder(Decoder[AutoregressiveSession]):
    """Generates with the target alone; the pair's draft is not used. It has no knobs."""

    name = "autoregressive"
    lossless = True
    needs_draft = False
    session_class = AutoregressiveSession


class Generates(Protocol):
    """Anything that generates text as a `Decoder` does."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        knobs: Mapping[str, float] | None,
    ) -> Generation:
        """Generate to the end."""
        ...


class Side(NamedTuple):
    """A decoder with its knobs; None for their defaults."""

    decoder: Generates
    knobs: Mapping[str, float] | None = None


def decode_in_turns(
    sides: Mapping[str, Side],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    warm_up: int = 64,
) -> Iterator[dict[str, Generation]]:
    """Decode every prompt by all sides before the next prompt.

    Args:
        sides: decoders by name, in the order of their turns.
        prompts: token ids.
        max_new_tokens: most tokens generated for a prompt.
        sampling: how tokens are drawn.
        seeds: seed of each prompt, the same for all sides; by default 0, 1, 2, ...
        warm_up: tokens that all sides generate from the first prompt beforehand, since a first generation pays for
            what is set up once; 0 for none. Passes are captured then, and not while prompts take their turns.

    Yields:
        Generations of a prompt by the names of the sides.
    """
    for decoder, knobs in sides.values() if warm_up and prompts else ():
        tokens = min(warm_up, max_new_tokens)
        with _capturing(decoder, after=1):
            decoder.generate(prompts[0], max_new_tokens=tokens, sampling=sampling, seed=0, knobs=knobs)
    for seed, prompt in zip(seeds or range(len(prompts)), prompts, strict=True):
        generations: dict[str, Generation] = {}
        for name, (decoder, knobs) in sides.items():
            with _capturing(decoder, after=NEVER):
                generations[name] = decoder.generate(
                    prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, knobs=knobs
                )
        yield generations


def _capturing(side: Generates, after: int) -> contextlib.AbstractContextManager[None]:
    """See `Pair.capturing`; others than our decoders have no pair."""
    return side.pair.capturing(after) if isinstance(side, Decoder) else contextlib.nullcontext()
