"""Drafts that end by the rules of engines or the expected gain: the text stays the target's, whatever the threshold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding.decoders import chain_session as speculative
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.expected_gain import KeepChances
from specgym.decoding.decoders.stop_rules import FixedLength, TokenRule
from specgym.decoding.decoders.traits import ENGINE_SETTINGS, SPECULATIVE_STOPS, SpeculativeStop
from specgym.decoding.drafts.copying import PromptLookupDrafter
from specgym.decoding.drafts.drafter import ModelStep
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from tests.helpers.known_distributions import PROMPT, MakeTable, distance, exact_joint, make_drafter, walk
from tests.helpers.toy_profile import charged, toy_profile

MakeModel = Callable[..., PreTrainedModel]
USUAL = KeepChances.assumed()
SURE = KeepChances(USUAL.kept**0.1, USUAL.average**0.1)  # drafts of random weights are sure of nothing


def test_greedy_output_equals_generate_whatever_the_rule_and_the_threshold(
    make_model: MakeModel, make_noisy: MakeModel, reference: Callable[..., list[list[int]]]
) -> None:
    model = make_model("llama")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 96, (1 + 4 * (number % 2),), generator=generator).tolist() for number in range(8)]
    expected = reference(model, prompts, 16)
    seen = [[*prompt, *text] for prompt, text in zip(prompts[::3], expected[::3], strict=True)]
    for draft in (make_noisy(model, 0.02), NGramDrafter.fit(seen, 96, order=3), PromptLookupDrafter(96, longest=2)):
        for stop in SPECULATIVE_STOPS:
            decoder = charged(SpeculativeDecoder(Pair(model, draft), 8, stop), toy_profile(0.02, chances=SURE))
            lengths = set()
            some = range(8) if len(decoder.knobs) == 3 else range(3, 8)
            for number in some:
                # From 0 over what a draft of random weights is sure of to 1, which ends every draft at its first token.
                threshold = (0.0, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 0.2)[number]
                usual = {"draft_length": (8, 8, 5, 8, 3, 8, 8, 0)[number], "stop_threshold": threshold}
                usual["min_draft_length"] = (0, 2, 0, 0, 1, 0, 3, 0)[number]
                knobs = {knob.name: usual[knob.name] for knob in decoder.knobs}
                generation = decoder.generate(prompts[number], max_new_tokens=16, knobs=knobs)
                assert generation.tokens == expected[number], (stop, knobs)
                lengths |= {round_.drafted for round_ in generation.rounds}
            assert len(lengths) > 2


def test_a_threshold_of_0_asks_for_nothing(make_table: MakeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(rule: TokenRule, step: ModelStep) -> float:
        raise AssertionError("the host would wait for the answer")

    monkeypatch.setattr(TokenRule, "sureness", refused)
    pair = Pair(make_table(6, seed=1), make_drafter("model", make_table, 6))
    decoder = SpeculativeDecoder(pair, 4, "llama.cpp")
    for knobs in ({"draft_length": 4}, {"draft_length": 4, "min_draft_length": 2}):
        rounds = decoder.generate(PROMPT, max_new_tokens=12, sampling=Sampling(), seed=0, knobs=knobs).rounds
        assert {round_.drafted for round_ in rounds[:-4]} == {4}


def test_a_round_says_what_was_drafted_beyond_what_is_verified(make_table: MakeTable) -> None:
    pair = Pair(make_table(6, seed=1), make_drafter("model", make_table, 6))
    decoder = SpeculativeDecoder(pair, 4, "llama.cpp")
    knobs = {"draft_length": 4, "stop_threshold": 1.0}
    session = decoder.start(PROMPT, max_new_tokens=8, seed=0)
    round_ = session.step(knobs)
    assert (round_.drafted, round_.draft_steps, round_.target_tokens, len(round_.tokens)) == (0, 1, 1, 1)
    plain = session.step({**knobs, "draft_length": 0})
    assert (plain.drafted, plain.draft_steps, len(plain.tokens)) == (0, 0, 1)


def test_rules_have_their_knobs_and_wrong_names_are_refused(make_table: MakeTable) -> None:
    pair = Pair(make_table(6, seed=1), make_drafter("model", make_table, 6))
    names = {stop: [knob.name for knob in SpeculativeDecoder(pair, 4, stop).knobs] for stop in SPECULATIVE_STOPS}
    assert names == {
        "transformers": ["draft_length", "stop_threshold"],
        "llama.cpp": ["draft_length", "stop_threshold", "min_draft_length"],
        "never": ["draft_length"],
        "expected-gain": ["draft_length"],
    }
    for stop in (None, FixedLength(2)):
        assert [knob.name for knob in SpeculativeDecoder(pair, 4, stop).knobs] == ["draft_length"]
    names_known = r"'transformers', 'llama\.cpp', 'never', 'expected-gain'"
    with pytest.raises(ValueError, match=rf"stop must be one of {names_known}, got 'vllm'"):
        SpeculativeDecoder(pair, 4, "vllm")  # type: ignore[arg-type]
    for settings in ENGINE_SETTINGS.values():
        known = {knob.name for knob in SpeculativeDecoder.knobs_without_pair(stop=settings.stop)}
        assert set(settings.settings) == set(settings.defaults) == known


RULES: dict[str, tuple[tuple[SpeculativeStop, dict[str, float]], ...]] = {
    "model": (
        ("expected-gain", {}),
        ("transformers", {"stop_threshold": 0.6}),
        ("llama.cpp", {"stop_threshold": 0.6}),
        ("llama.cpp", {"stop_threshold": 0.6, "min_draft_length": 2}),
    ),
    "prompt-lookup": (("llama.cpp", {"stop_threshold": 0.6, "min_draft_length": 2}),),
}


@pytest.mark.parametrize("kind", RULES)
def test_speculative_sampling_is_exact_by_the_rules_of_engines(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, kind: str
) -> None:
    target = make_table(2, seed=1, spread=1.2)
    expected = exact_joint(target, Sampling(), PROMPT, 3)
    for stop, chosen in RULES[kind]:
        decoder = charged(SpeculativeDecoder(Pair(target, make_drafter(kind, make_table, 2)), 3, stop))
        knobs = {"draft_length": 3, **chosen}
        joint, _, _ = walk(monkeypatch, decoder, Sampling(), 3, knobs, ahead=2)
        assert distance(joint, expected) < 1e-5, (stop, chosen)
        lengths = {
            round_.drafted
            for seed in range(20)
            for round_ in decoder.generate(
                PROMPT, max_new_tokens=12, sampling=Sampling(), seed=seed, knobs=knobs
            ).rounds[:-3]
        }
        assert lengths - {3}, (stop, chosen)  # the rule had its say
        assert min(lengths - {0}) >= chosen.get("min_draft_length", 0)


def test_a_rule_that_leaves_a_token_out_for_what_was_drawn_is_found_out(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable
) -> None:
    target = make_table(2, seed=1, spread=1.2)
    decoder = SpeculativeDecoder(Pair(target, make_drafter("model", make_table, 2)), 3, "llama.cpp")

    def of_the_drawn_token(rule: TokenRule, step: ModelStep) -> float:
        assert step.probabilities is not None
        return float(step.probabilities[0, step.token])

    monkeypatch.setattr(TokenRule, "sureness", of_the_drawn_token)
    knobs = {"draft_length": 3, "stop_threshold": 0.6}
    joint, _, _ = walk(monkeypatch, decoder, Sampling(), 3, knobs, ahead=2)
    assert distance(joint, exact_joint(target, Sampling(), PROMPT, 3)) > 0.01


def test_a_dropped_draft_that_leaves_no_trace_is_found_out(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable
) -> None:
    target = make_table(2, seed=1, spread=1.2)
    decoder = SpeculativeDecoder(Pair(target, make_drafter("model", make_table, 2)), 3, "llama.cpp")

    def forgotten(session: speculative.SpeculativeSession, scores: Tensor, first: object) -> speculative.Verdict:
        p = session.sampling.probabilities(scores)
        return speculative.Verdict(torch.tensor(0), speculative.draw(p[0], session.generator), torch.zeros(0))

    monkeypatch.setattr(speculative.SpeculativeSession, "_judge_dropped", forgotten)
    knobs = {"draft_length": 3, "stop_threshold": 0.6, "min_draft_length": 2}
    joint, _, _ = walk(monkeypatch, decoder, Sampling(), 3, knobs, ahead=2)
    assert distance(joint, exact_joint(target, Sampling(), PROMPT, 3)) > 0.01
