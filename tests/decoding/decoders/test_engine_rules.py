"""Drafts that end by the rules of engines: the text stays the target's, whatever the threshold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specgym.decoding.decoders import chain as speculative
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.stop_rules import TokenRule
from specgym.decoding.decoders.traits import EngineStop
from specgym.decoding.drafts.drafter import ModelStep
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from tests.helpers.known_distributions import PROMPT, MakeTable, distance, exact_joint, make_drafter, walk

ENGINE_RULES: dict[str, tuple[tuple[EngineStop, dict[str, float]], ...]] = {
    "model": (
        ("transformers", {"stop_threshold": 0.6}),
        ("llama.cpp", {"stop_threshold": 0.6}),
        ("llama.cpp", {"stop_threshold": 0.6, "min_draft_length": 2}),
    ),
    "prompt-lookup": (("llama.cpp", {"stop_threshold": 0.6, "min_draft_length": 2}),),
}


@pytest.mark.parametrize("kind", ENGINE_RULES)
def test_speculative_sampling_is_exact_by_the_rules_of_engines(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, kind: str
) -> None:
    target = make_table(2, seed=1, spread=1.2)
    expected = exact_joint(target, Sampling(), PROMPT, 3)
    for stop, chosen in ENGINE_RULES[kind]:
        decoder = SpeculativeDecoder(Pair(target, make_drafter(kind, make_table, 2)), 3, stop)
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
