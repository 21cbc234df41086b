"""What a setting of a decoder's knobs does to some prompts: the one definition that learning and evaluation share, live
and replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specgym.decoding import GREEDY, AutoregressiveDecoder, Decoder, Generation, LatencyProfile, Sampling, measured

from ..tuning.reward import Number


def measure_setting(
    decoder: Decoder,
    knobs: Mapping[str, float] | None,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    profile: LatencyProfile | None = None,
) -> dict[str, float]:
    """Decode some prompts with one setting, and summarise; see `summarise` for the metrics.

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
    decoder: Decoder,
    knobs: Mapping[str, float] | None,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
) -> list[Generation]:
    """One generation a prompt, in order. Arguments and errors as for `measure_setting`."""
    if not prompts:
        raise ValueError("there is nothing to measure: give at least one prompt")
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


def summarise(decoder: Decoder, generations: Sequence[Generation], profile: LatencyProfile) -> dict[str, float]:
    """Metrics of some generations together. Rates are ratios of sums, so that a long text counts for more.

    Returns:
        What `metrics` gives, and `wall_ms_per_token` and `wall_seconds` by the clock. Reading the prompts is in none of
        them.
    """
    rounds = [cycle for generation in generations for cycle in generation.rounds]
    tokens = sum(len(generation.tokens) for generation in generations)
    # Plain decoding verifies nothing, so a round of it is cheaper than a round with an empty draft.
    plain = isinstance(decoder, AutoregressiveDecoder)
    wall_seconds = sum(generation.seconds for generation in generations)
    found = metrics(
        tokens=float(tokens),
        rounds=float(len(rounds)),
        drafted=float(sum(cycle.drafted for cycle in rounds)),
        accepted=float(sum(cycle.accepted for cycle in rounds)),
        divergence=sum(cycle.divergence for cycle in rounds),
        seconds=profile.autoregressive_seconds * tokens if plain else profile.charge(rounds),
        autoregressive_seconds=profile.autoregressive_seconds,
    )
    return {**found, "wall_ms_per_token": 1000 * wall_seconds / tokens, "wall_seconds": wall_seconds}


def metrics(
    *,
    tokens: Number,
    rounds: Number,
    drafted: Number,
    accepted: Number,
    divergence: Number,
    seconds: Number,
    autoregressive_seconds: Number | float,
) -> dict[str, Number]:
    """Metrics from sums over rounds; floats for floats, arrays for arrays.

    Args:
        tokens: emitted.
        rounds: of drafting and verifying.
        drafted: draft tokens that were verified.
        accepted: draft tokens among those emitted.
        divergence: the sum of `Round.divergence`.
        seconds: charged for the rounds.
        autoregressive_seconds: charged per token of plain decoding.

    Returns:
        `speedup`, plain decoding's charged time over this one's; `ms_per_token` as charged; `draft_acceptance_rate` and
        `divergence`, 0 to 1; `mean_acceptance_length` in tokens a round; and `tokens`, `rounds`, `drafted`, `accepted`
        and `seconds` as given.
    """
    return {
        "speedup": autoregressive_seconds * tokens / seconds,
        "ms_per_token": 1000 * seconds / tokens,
        "draft_acceptance_rate": accepted / (drafted + (drafted == 0)),
        "mean_acceptance_length": tokens / rounds,
        "divergence": divergence / tokens,
        "tokens": tokens,
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "seconds": seconds,
    }
