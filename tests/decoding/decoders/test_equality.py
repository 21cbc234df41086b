"""Greedy decoding gives, token for token, what `transformers` generates: 48 tokens, float32, of 12 prompts on random
models and of 2 on each shipped pair, where the pairs of a target take turns with 8."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoder import Decoder
from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.drafts.copying import PromptLookupDrafter
from specgym.decoding.drafts.drafter import Drafter
from specgym.decoding.drafts.mixed import drafts_of
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.loading.pair import Pair, load_pair
from specgym.decoding.loading.presets import PRESETS
from specgym.decoding.prompts import load_prompts
from specgym.decoding.rounds import Generation
from tests.helpers.toy_profile import ENDS

PROMPTS, NEW = 12, 48
FAMILIES = ("llama", "gpt2")
"""Rotated and learned positions; `tests/decoding/models/test_architectures.py` has the other architectures."""
Reference = Callable[..., list[list[int]]]
ROLLBACKS = (1.0, 1.5, 2.0, 3.25, 8.0)
SHIPPED = [name for name, preset in PRESETS.items() if name.startswith("tiny") and preset.draft]


def check(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    knobs: Callable[[int], dict[str, float]] = lambda number: {},
) -> list[Generation]:
    """Decode every prompt and compare; returns the generations."""
    generations = [
        decoder.generate(prompt, max_new_tokens=NEW, knobs=knobs(number), seed=number)
        for number, prompt in enumerate(prompts)
    ]
    for number, (generation, tokens) in enumerate(zip(generations, expected, strict=True)):
        assert generation.tokens == list(tokens), f"prompt {number} of {type(decoder).__name__}"
    return generations


def acceptance(generations: Sequence[Generation]) -> float:
    """Over all rounds."""
    accepted = sum(round_.accepted for generation in generations for round_ in generation.rounds)
    return accepted / max(1, sum(round_.drafted for generation in generations for round_ in generation.rounds))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_on_random_models_equals_generate(
    make_model: Callable[..., PreTrainedModel],
    make_noisy: Callable[..., PreTrainedModel],
    reference: Reference,
    family: str,
) -> None:
    model = make_model(family)
    generator = torch.Generator().manual_seed(1)
    # Four lengths, so that the reference runs in four batches.
    prompts = [torch.randint(0, 96, (1 + 4 * (number % 4),), generator=generator).tolist() for number in range(PROMPTS)]
    expected = reference(model, prompts, NEW)
    draft = make_noisy(model, 0.02)
    seen = [[*prompt, *text] for prompt, text in zip(prompts[::2], expected[::2], strict=True)]
    drafters: list[PreTrainedModel | Drafter] = [
        draft,
        NGramDrafter.fit(seen, 96, order=3),
        PromptLookupDrafter(96, longest=2),
    ]
    check(AutoregressiveDecoder(Pair(model)), prompts, expected)
    for drafter in drafters:
        pair = Pair(model, drafter)
        lengths = [{"draft_length": float(1 + number % 8)} for number in range(PROMPTS)]
        generations = check(SpeculativeDecoder(pair), prompts, expected, lengths.__getitem__)
        # Both paths were walked: often by the model draft; text of random weights gives the other two less to find.
        if drafter is draft:
            assert 0.1 < acceptance(generations) < 0.9, pair.name
        else:
            accepted = sum(round_.accepted for generation in generations for round_ in generation.rounds)
            drafted = sum(round_.drafted for generation in generations for round_ in generation.rounds)
            assert min(accepted, drafted - accepted) >= 30, (pair.name, accepted, drafted)
    knobs = [{"fallback": 0.0, "rollback": ROLLBACKS[number % len(ROLLBACKS)]} for number in range(PROMPTS)]
    drafted_by: dict[str, set[int]] = {}
    for name, ends in ENDS.items():
        some, fewer = (slice(0, PROMPTS), slice(0, 8)) if name == "never" else (slice(0, 10), slice(0, 5))
        generations = check(ends(Pair(model, draft), 8), prompts[some], expected[some], knobs.__getitem__)
        assert 0.05 < acceptance(generations) < 0.9
        drafted_by[name] = {round_.drafted for generation in generations for round_ in generation.rounds[:-8]}
        for drafter in drafters[1:]:
            check(ends(Pair(model, drafter), 8), prompts[fewer], expected[fewer], knobs.__getitem__)
    assert drafted_by["never"] == {8}
    assert len(drafted_by["expected-gain"]) > 2  # the rule had its say


@pytest.fixture(scope="module")
def expected_of(reference: Reference) -> Callable[[Pair], tuple[list[list[int]], list[list[int]]]]:
    """Prompts from all shipped sets and what each shipped target makes of them, computed once a target."""
    known: dict[str, tuple[list[list[int]], list[list[int]]]] = {}

    def of(pair: Pair) -> tuple[list[list[int]], list[list[int]]]:
        if pair.target.name not in known:
            texts = [text for name in ("prose", "code", "definitions", "chat") for text in load_prompts(name).train[:2]]
            prompts = [pair.encode(text)[:64] for text in texts]
            known[pair.target.name] = prompts, reference(pair.target.model, prompts, NEW)
        return known[pair.target.name]

    return of


@pytest.mark.parametrize("name", SHIPPED)
def test_greedy_output_of_shipped_pairs_equals_generate(
    name: str, expected_of: Callable[[Pair], tuple[list[list[int]], list[list[int]]]]
) -> None:
    pair = load_pair(name)
    prompts, expected = (every[SHIPPED.index(name) % 4 :: 4] for every in expected_of(pair))
    generations = check(SpeculativeDecoder(pair), prompts, expected)
    assert 0 < acceptance(generations) < 1
    # Short drafts and rollbacks, to be done in minutes; the random models above have the long ones.
    # The expected gain weighs the costs of a single draft.
    for start, ends in enumerate(ENDS.values() if len(drafts_of(pair.draft)) == 1 else [ENDS["never"]]):
        check(
            ends(pair, 4),
            prompts[start::2],
            expected[start::2],
            lambda number: {"fallback": 0.0, "rollback": ROLLBACKS[number % 3]},
        )


@pytest.mark.parametrize("name", [next(n for n in SHIPPED if PRESETS[n].target == t) for t in ("tiny-10m", "tiny-3m")])
def test_greedy_autoregressive_output_of_shipped_targets_equals_generate(
    name: str, expected_of: Callable[[Pair], tuple[list[list[int]], list[list[int]]]]
) -> None:
    pair = load_pair(name)
    prompts, expected = expected_of(pair)
    check(AutoregressiveDecoder(pair), prompts[::2], expected[::2])
