"""Samples follow the target's distribution, and threshold decoding stays within its certificate.

Two ways, both through the real sessions on toy models whose distribution is known:

- *exactly*: every random choice (a draft token, an acceptance, the target's token) is replaced by a branch with its
  probability, and all branches are walked, so that the joint distribution comes out to rounding error;
- *sampled*: thousands of seeded texts, and a chi-square test of the joint distribution of their first three tokens.
  Each test's significance is 1e-3, so that with the fourteen here (Bonferroni) one run in seventy would fail for no
  reason, were the seeds not fixed. The usual mistakes are 1000 times as significant with 1,000 and 1,500 texts: of four
  tokens, since a test of more has more classes, and less power with the same texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from specgym.decoding.decoder import Decoder
from specgym.decoding.decoders import chain_session as speculative
from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.decoders.stop_rules import ConfidenceBelow, EntropyAbove, ProductBelow, StopRule
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.drafts import drafter as drafters
from specgym.decoding.drafts.drafter import ModelDrafter
from specgym.decoding.loading.pair import Pair
from specgym.decoding.sampling import Sampling
from tests.helpers.known_distributions import (
    PROMPT,
    SAMPLINGS,
    MakeTable,
    conditional,
    distance,
    exact_joint,
    make_drafter,
    p_value_of,
    strayed,
    walk,
)
from tests.helpers.toy_profile import ENDS

SIGNIFICANCE = 1e-3
Ends = Callable[[Pair, int], ThresholdDecoder]


def sampled_p_value(
    decoder: Decoder, sampling: Sampling, generations: int, knobs: dict[str, float] | None = None, first_seed: int = 0
) -> float:
    """The chi-square test of the first three tokens; 0 where an impossible text came up."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(first_seed, first_seed + generations):
        session = decoder.start(PROMPT, max_new_tokens=3, sampling=sampling, seed=seed)
        while not session.finished:
            session.step(knobs)
        text = tuple(session.tokens)
        counts[text] = counts.get(text, 0) + 1
    return p_value_of(counts, exact_joint(decoder.pair.target, sampling, PROMPT, 3))


@pytest.mark.parametrize("kind", ["model", "reduced", "translated", "ngram", "prompt-lookup", "suffix", "cascade"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_speculative_sampling_is_exact(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, kind: str, sampling: Sampling
) -> None:
    target = make_table(3, seed=1, spread=1.2)
    decoder = SpeculativeDecoder(Pair(target, make_drafter(kind, make_table, 3)))
    expected = exact_joint(target, sampling, PROMPT, 3)
    for draft_length in (1, 2):
        joint, divergence, _ = walk(monkeypatch, decoder, sampling, 3, {"draft_length": draft_length})
        assert distance(joint, expected) < 1e-5
        assert divergence == 0


@pytest.mark.parametrize("draft_length", [3, 4])
def test_speculative_sampling_is_exact_for_longer_drafts(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, draft_length: int
) -> None:
    target = make_table(2, seed=1, spread=1.2)
    for kind in ("model", "ngram", "prompt-lookup"):
        decoder = SpeculativeDecoder(Pair(target, make_drafter(kind, make_table, 2)))
        expected = exact_joint(target, Sampling(), PROMPT, 3)
        joint, _, _ = walk(monkeypatch, decoder, Sampling(), 3, {"draft_length": draft_length}, ahead=2)
        assert distance(joint, expected) < 1e-5


RULES: dict[str, tuple[StopRule, ...]] = {
    "model": (ConfidenceBelow(0.6), EntropyAbove(0.6), ProductBelow(0.2)),
    "prompt-lookup": (ConfidenceBelow(0.6), ProductBelow(0.6)),
}


@pytest.mark.parametrize("kind", RULES)
def test_speculative_sampling_is_exact_whatever_rule_ends_the_drafts(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, kind: str
) -> None:
    target = make_table(2, seed=1, spread=1.2)
    expected = exact_joint(target, Sampling(), PROMPT, 3)
    for rule in RULES[kind]:
        decoder = SpeculativeDecoder(Pair(target, make_drafter(kind, make_table, 2)), max_draft_length=4, stop=rule)
        joint, _, _ = walk(monkeypatch, decoder, Sampling(), 3, ahead=2)
        assert distance(joint, expected) < 1e-5
        lengths = [
            [
                round_.drafted
                for seed in range(20)
                for round_ in item.generate(PROMPT, max_new_tokens=12, sampling=Sampling(), seed=seed).rounds
            ]
            for item in (decoder, SpeculativeDecoder(decoder.pair, max_draft_length=4))
        ]
        assert lengths[0] != lengths[1]  # the rule had its say


def test_autoregressive_sampling_is_exact(monkeypatch: pytest.MonkeyPatch, make_table: MakeTable) -> None:
    target = make_table(4, seed=1)
    joint, _, _ = walk(monkeypatch, AutoregressiveDecoder(Pair(target)), SAMPLINGS["all"], 3)
    assert distance(joint, exact_joint(target, SAMPLINGS["all"], PROMPT, 3)) < 1e-6


PROCESSORS = {
    "repetition penalty": RepetitionPenaltyLogitsProcessor(1.6),
    "bad words": NoBadWordsLogitsProcessor([[1], [0, 2]]),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("kind", ["model", "translated", "prompt-lookup"])
def test_sampling_is_exact_with_logits_processors(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, kind: str, name: str
) -> None:
    target, processors = make_table(3, seed=1, spread=1.2), [PROCESSORS[name]]
    pair = Pair(target, make_drafter(kind, make_table, 3))
    expected = exact_joint(target, SAMPLINGS["hot"], PROMPT, 3, processors)
    assert distance(expected, exact_joint(target, SAMPLINGS["hot"], PROMPT, 3)) > 0.1
    decoders: list[tuple[Decoder, dict[str, float]]] = [
        (AutoregressiveDecoder(pair), {}),
        (SpeculativeDecoder(pair), {"draft_length": 2}),
        (ThresholdDecoder(pair, 2, "never"), {"fallback": 0.0, "rollback": 1.0}),
    ]
    for decoder, knobs in decoders:
        joint, divergence, _ = walk(monkeypatch, decoder, SAMPLINGS["hot"], 3, knobs, processors=processors)
        assert distance(joint, expected) < 1e-5
        assert divergence == 0


def wrong_residual(p: Tensor, q: Tensor) -> Tensor:
    """After a rejection the token comes from the target, as if nothing had been rejected: the usual mistake."""
    return p


def test_a_wrong_residual_is_found_out(monkeypatch: pytest.MonkeyPatch, make_table: MakeTable) -> None:
    target = make_table(4, seed=1, spread=1.2)
    decoder = SpeculativeDecoder(Pair(target, make_drafter("model", make_table, 4)))
    monkeypatch.setattr(speculative, "residual", wrong_residual)
    assert sampled_p_value(decoder, Sampling(), 1_000, {"draft_length": 2}) < SIGNIFICANCE / 1000
    joint, _, _ = walk(
        monkeypatch,
        SpeculativeDecoder(Pair(make_table(3, seed=1), make_drafter("model", make_table, 3))),
        Sampling(),
        3,
        {"draft_length": 2},
    )
    assert distance(joint, exact_joint(make_table(3, seed=1), Sampling(), PROMPT, 3)) > 0.01


def test_a_draft_distribution_of_another_temperature_is_found_out(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable
) -> None:
    target = make_table(4, seed=1, spread=1.2)
    decoder = SpeculativeDecoder(Pair(target, make_drafter("model", make_table, 4)))
    passes = speculative.SpeculativeSession._passes

    def warmer(
        session: speculative.SpeculativeSession, p: Tensor, proposal: drafters.Proposal
    ) -> Tensor:  # the draft drew at temperature 1 and is tested as if at 2
        if proposal.logits is None:  # no room was left for a draft
            return passes(session, p, proposal)
        return passes(session, p, drafters.Proposal(proposal.tokens, None, (proposal.logits / 2).softmax(-1)))

    monkeypatch.setattr(speculative.SpeculativeSession, "_passes", warmer)
    assert sampled_p_value(decoder, Sampling(), 1_500, {"draft_length": 2}) < SIGNIFICANCE / 1000


def test_2_000_texts_follow_the_target(make_table: MakeTable) -> None:
    target = make_table(4, seed=1, spread=1.2)
    decoder = SpeculativeDecoder(Pair(target, make_drafter("model", make_table, 4)))
    assert sampled_p_value(decoder, Sampling(0.8, top_k=3, top_p=0.9), 2_000, {"draft_length": 2}) > SIGNIFICANCE


CASES = list(itertools.product(["model", "reduced", "ngram", "prompt-lookup"], ["hot", "top-k", "top-p"]))
CASES.remove(("reduced", "top-p"))  # the likeliest tokens alone are those of the draft that is not reduced
CASES.append(("prompt-lookup", "cold"))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_sampled_texts_follow_the_target(make_table: MakeTable, kind: str, name: str) -> None:
    target = make_table(4, seed=4, spread=1.2)
    decoder = SpeculativeDecoder(Pair(target, make_drafter(kind, make_table, 4)))
    draft_length = 1 + CASES.index((kind, name)) % 4
    texts = 1_500 if kind == "model" else 1_000  # by then a wrong residual is seen in every case
    assert sampled_p_value(decoder, SAMPLINGS[name], texts, {"draft_length": draft_length}) > SIGNIFICANCE


FALLBACKS = (0.0, 0.15, 0.4, 1.0)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("kind", ["model", "translated", "ngram"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_p=0.9)], ids=["plain", "warped"])
def test_every_conditional_distribution_is_within_fallback_of_the_target(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable, ends: Ends, kind: str, sampling: Sampling
) -> None:
    target = make_table(3, seed=1, spread=1.2)
    decoder = ends(Pair(target, make_drafter(kind, make_table, 3)), 2)
    worst = []
    for fallback in FALLBACKS:
        knobs = {"fallback": fallback, "rollback": 1.0}
        joint, divergence, tokens = walk(monkeypatch, decoder, sampling, 3, knobs)
        assert tokens == pytest.approx(3)
        assert sum(joint.values()) == pytest.approx(1)
        actual, largest = strayed(joint, target, sampling, 3)
        assert largest <= fallback + 1e-5, fallback
        worst.append(largest)
        # Tokens are drafted in places that depend on chance, so the report bounds the actual divergence from above.
        assert actual <= divergence + 1e-5
        if fallback == 0:
            assert divergence == 0
            assert distance(joint, exact_joint(target, sampling, PROMPT, 3)) < 1e-5
    assert worst[-1] > 0.2  # the bound is not kept by doing nothing


def test_the_reported_divergence_is_the_actual_one_where_every_token_is_drafted(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable
) -> None:
    target, draft = make_table(4, seed=1), make_table(4, seed=2)
    decoder = ThresholdDecoder(Pair(target, ModelDrafter(draft)), 1, "never")
    joint, divergence, _ = walk(monkeypatch, decoder, Sampling(), 1, {"fallback": 1.0, "rollback": 1.0}, ahead=1)
    p, q = conditional(target, Sampling(), PROMPT), conditional(draft, Sampling(), PROMPT)
    assert divergence == pytest.approx(float((p - q).abs().sum() / 2), abs=1e-6)
    torch.testing.assert_close(torch.tensor([joint[(token,)] for token in range(4)], dtype=torch.float64), q)


@pytest.mark.parametrize("kind", ["model", "ngram", "prompt-lookup"])
def test_threshold_decoding_at_fallback_0_is_speculative_sampling_with_the_same_seed(
    make_table: MakeTable, kind: str
) -> None:
    pair = Pair(make_table(6, seed=1), make_drafter(kind, make_table, 6))
    for seed in range(30):
        options = {"max_new_tokens": 20, "sampling": Sampling(0.8), "seed": seed}
        exact = SpeculativeDecoder(pair).generate(PROMPT, knobs={"draft_length": 4}, **options)  # type: ignore[arg-type]
        ours = ThresholdDecoder(pair, 4, "never").generate(PROMPT, knobs={"fallback": 0.0}, **options)  # type: ignore[arg-type]
        assert ours.tokens == exact.tokens
        assert ours.divergence == exact.divergence == 0


def test_greedy_fallback_1_follows_the_draft_and_reports_how_far_it_is(make_table: MakeTable) -> None:
    target, draft = make_table(6, seed=1), make_table(6, seed=2)
    decoder = ThresholdDecoder(Pair(target, ModelDrafter(draft)), 4, "never")
    session = decoder.start(PROMPT, max_new_tokens=40)
    follows = AutoregressiveDecoder(Pair(draft))
    kinds: set[bool] = set()
    while session._room >= 4:
        before = list(session.context)
        round_ = session.step({"fallback": 1.0})
        assert round_.accepted == 4
        assert list(round_.tokens[:4]) == follows.generate(before, max_new_tokens=4).tokens
        texts = [[*before, *round_.tokens[:place]] for place in range(4)]
        ours = [conditional(target, Sampling(), text) for text in texts]
        theirs = [conditional(draft, Sampling(), text) for text in texts]
        chosen = [int(token) == int(p.argmax()) for token, p in zip(round_.tokens[:4], ours, strict=True)]
        distances = [
            0.0 if same else (p - q).abs().sum().item() / 2 for same, p, q in zip(chosen, ours, theirs, strict=True)
        ]
        assert round_.divergence == pytest.approx(sum(distances), abs=1e-5)
        kinds.update(chosen)
    assert kinds == {True, False}  # tokens that are the target's own choice count nothing, and there are others
