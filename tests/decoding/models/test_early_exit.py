"""Early exit: verification goes on from what drafting computed, nothing is computed twice, texts are the target's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from specgym.decoding import (
    AutoregressiveDecoder,
    DraftTreeDecoder,
    LanguageModel,
    MixedDraft,
    NGramDrafter,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SpeculativeDecoder,
    ThresholdDecoder,
    TokenTree,
    load_pair,
    memory_of,
)
from specgym.decoding.drafts.drafter import ModelDrafter
from specgym.decoding.errors import ArgumentError, UnsupportedModelError
from specgym.decoding.latency.batch_grid import StopwatchDrafter
from specgym.decoding.models.early_exit import EarlyExit, ExitModel, ResumingTarget, _Tap
from tests.helpers.first_tokens import assert_texts_follow_the_target
from tests.helpers.known_distributions import PROMPT, distance, exact_joint, walk

MakeModel = Callable[..., PreTrainedModel]
TEXT = torch.tensor([5, 17, 80, 3, 44, 9, 9, 61, 2, 30, 71, 12])


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> PreTrainedModel:
    """A model whose later layers change little, as in trained ones, so that the earlier ones draft well."""
    built = make_model("llama", layers=4, spread=0.15)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if name.startswith(("model.layers.2.", "model.layers.3.")) and ("o_proj" in name or "down_proj" in name):
                weight.mul_(0.4)
    return built


@pytest.fixture(scope="module")
def pair(model: PreTrainedModel) -> Pair:
    return Pair(model, EarlyExit(2))


@contextmanager
def tokens_counted(model: PreTrainedModel) -> Iterator[Counter[int]]:
    """Tokens that each decoder layer reads meanwhile, by its number."""
    counts: Counter[int] = Counter()

    def count(place: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            counts[place] += arguments[0].shape[1]

        return hook

    layers = model.get_submodule("model.layers").children()
    handles = [layer.register_forward_pre_hook(count(place)) for place, layer in enumerate(layers)]
    yield counts
    for handle in handles:
        handle.remove()


def begun(pair: Pair, read: int) -> ResumingTarget:
    """The target of a pair with the beginning of the text in its cache."""
    target = pair.target.fresh()
    assert isinstance(target, ResumingTarget)
    target.forward(TEXT[:read])
    return target


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("layers", [1, 2])
def test_logits_after_drafting_are_those_of_a_whole_pass(make_model: MakeModel, family: str, layers: int) -> None:
    model = make_model(family, layers=3)
    pair = Pair(model, EarlyExit(layers), prepack=False)
    with torch.inference_mode():
        expected = model(TEXT[None]).logits[0]
    for drafted in (TEXT[4:9], TEXT[4:12], torch.cat([TEXT[4:6], TEXT[:3]]), TEXT[:2]):
        target = begun(pair, 4)
        for token in drafted.split(1):
            target.exit.forward(token)
        assert (target.length, target.exit.length) == (4, 4 + len(drafted))
        torch.testing.assert_close(target.forward(TEXT[4:10]).scores, expected[4:10], rtol=1e-3, atol=1e-3)
        assert target.length == target.exit.length == 10
        # Some are taken back, others are drafted in their place, and of those one is left unverified.
        target.truncate(7)
        target.exit.forward(TEXT[7:9])
        target.exit.truncate(8)
        target.exit.forward(TEXT[:3])
        assert target.exit.length == 11
        torch.testing.assert_close(target.forward(TEXT[7:]).scores, expected[7:], rtol=1e-3, atol=1e-3)


def test_scores_of_chosen_rows_hidden_states_and_trees_are_those_of_the_target(
    pair: Pair, model: PreTrainedModel
) -> None:
    plain = LanguageModel(model, prepack=False)
    plain.forward(TEXT[:4])
    read = plain.forward(TEXT[4:], hidden=True)
    rows = torch.tensor([1, 5])
    for chosen, kept in (({"rows": rows}, rows), ({"last": 2}, slice(-2, None))):
        target = begun(pair, 4)
        target.exit.forward(TEXT[4:7])
        result = target.forward(TEXT[4:], hidden=True, **chosen)
        torch.testing.assert_close(result.scores, read.scores[kept], rtol=1e-3, atol=1e-3)
        assert result.hidden is not None
        assert read.hidden is not None
        torch.testing.assert_close(result.hidden, read.hidden[kept], rtol=1e-3, atol=1e-3)
    target = begun(pair, 4)
    target.exit.forward(TEXT[4:7])  # of no use to a tree
    tree = TokenTree([-1, -1, 1])
    other = plain.fresh()
    other.forward(TEXT[:4])
    torch.testing.assert_close(
        target.forward(TEXT[3:6], tree).scores, other.forward(TEXT[3:6], tree).scores, rtol=1e-3, atol=1e-3
    )
    target.keep([1, 2])
    other.keep([1, 2])
    target.exit.forward(TEXT[:2])
    torch.testing.assert_close(target.forward(TEXT[:3]).scores, other.forward(TEXT[:3]).scores, rtol=1e-3, atol=1e-3)


def test_no_layer_reads_a_token_twice_and_no_weight_is_copied(pair: Pair, model: PreTrainedModel) -> None:
    with tokens_counted(model) as counts:
        generation = SpeculativeDecoder(pair).generate(TEXT.tolist(), max_new_tokens=40, knobs={"draft_length": 3})
    drafted = sum(round_.drafted for round_ in generation.rounds)
    accepted = sum(round_.accepted for round_ in generation.rounds)
    assert 0 < accepted < drafted
    needed = len(TEXT) - 1 + drafted + len(generation.rounds)
    assert counts == dict.fromkeys(range(4), needed)
    assert isinstance(pair.draft, ModelDrafter)
    weights = {weight.data_ptr() for weight in model.parameters()}
    assert all(weight.data_ptr() in weights for weight in pair.draft.model.model.parameters())
    use = memory_of(pair)
    assert (use.draft, use.per_token) == (0, memory_of(pair.without_draft()).per_token)
    # Drafting by itself, as for a recording, reads with a cache of its own.
    with tokens_counted(model) as counts:
        session = pair.draft.start(TEXT.tolist(), Sampling(0.0), torch.Generator(), torch.device("cpu"))
        assert len(list(session.steps(TEXT.tolist(), 3))) == 3
    assert counts == dict.fromkeys(range(2), len(TEXT) + 2)


def test_timing_drafts_as_texts_do_and_plain_decoding_reads_with_the_whole_model(
    pair: Pair, model: PreTrainedModel
) -> None:
    assert pair.draft is not None
    watch = StopwatchDrafter(pair.draft)
    watch.length = 3
    with tokens_counted(model) as counts:
        decoder = ThresholdDecoder(Pair(pair.target, watch), 3, "never")
        rounds = decoder.generate(TEXT.tolist(), max_new_tokens=12).rounds
    assert counts == dict.fromkeys(range(4), len(TEXT) - 1 + sum(round_.drafted + 1 for round_ in rounds))
    assert not isinstance(pair.without_draft().target, ResumingTarget)


def table() -> NGramDrafter:
    """A table whose tokens are often wrong."""
    text = torch.randint(0, 96, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    return NGramDrafter.fit([text], 96, order=2)


@pytest.mark.parametrize("kind", ["alone", "mixed", "two exits"])
def test_greedy_texts_are_those_of_generate(
    model: PreTrainedModel, reference: Callable[..., list[list[int]]], kind: str
) -> None:
    others: dict[str, list[Any]] = {
        "alone": [],
        "mixed": [PromptLookupDrafter(96, longest=2)],
        "two exits": [EarlyExit(1)],
    }
    pair = Pair(model, [EarlyExit(2), *others[kind]])
    assert isinstance(pair.draft, MixedDraft) is (kind != "alone")
    prompts = [TEXT[:length].tolist() for length in (1, 10)]
    expected = reference(model, prompts, 24)
    accepted = 0
    for number, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
        for decoder, knobs in (
            (SpeculativeDecoder(pair), {"draft_length": 2 + 3 * number}),
            (ThresholdDecoder(pair, 4, "never"), {"fallback": 0.0, "rollback": 1.0 + number}),
        ):
            generation = decoder.generate(prompt, max_new_tokens=24, knobs=knobs)
            assert generation.tokens == text
            accepted += sum(round_.accepted for round_ in generation.rounds)
    assert accepted > 10
    if kind == "alone":
        assert DraftTreeDecoder(pair).generate(prompts[1], max_new_tokens=24).tokens == expected[1]


def test_a_draft_handed_over_from_one_draft_to_another_is_verified_as_a_whole_pass_would(
    model: PreTrainedModel, reference: Callable[..., list[list[int]]]
) -> None:
    """The exit drafts, another goes on, the exit goes on from there; or another begins."""
    pair = Pair(model, [EarlyExit(2), table()])
    orders: tuple[Sequence[int], ...] = ((0, 0, 1, 0), (1, 0), (0, 1), (1, 1), ())
    session = SpeculativeDecoder(pair).start(TEXT.tolist(), max_new_tokens=48)
    for turn in range(48):
        for draft in orders[turn % len(orders)]:
            session.draft_one(draft)
        session.verify()
    assert session.tokens == reference(model, [TEXT.tolist()], 48)[0]


def test_logits_processors_change_draft_and_target_alike(pair: Pair) -> None:
    more: dict[str, Any] = {"max_new_tokens": 24, "logits_processor": [RepetitionPenaltyLogitsProcessor(1.6)]}
    plain = AutoregressiveDecoder(pair.without_draft()).generate(TEXT.tolist(), **more)
    generation = SpeculativeDecoder(pair).generate(TEXT.tolist(), knobs={"draft_length": 3}, **more)
    assert generation.tokens == plain.tokens
    assert plain.tokens != AutoregressiveDecoder(pair).generate(TEXT.tolist(), max_new_tokens=24).tokens
    assert sum(round_.accepted for round_ in generation.rounds) > 3


def test_samples_follow_the_target_and_states_from_the_wrong_place_are_found_out(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(make_model("llama", vocabulary=2, hidden=16, spread=0.4), EarlyExit(1))
    expected = exact_joint(pair.target, Sampling(), PROMPT, 3)
    joint, _, _ = walk(monkeypatch, SpeculativeDecoder(pair), Sampling(), 3, {"draft_length": 2})
    assert distance(joint, expected) < 1e-5

    def after_the_norm(self: _Tap, states: Tensor) -> Tensor:
        self.states = self.norm(states)
        return self.states

    monkeypatch.setattr(_Tap, "forward", after_the_norm)
    joint, _, _ = walk(monkeypatch, SpeculativeDecoder(pair), Sampling(), 3, {"draft_length": 2})
    assert distance(joint, expected) > 1e-3
    with pytest.raises(UnsupportedModelError, match="other logits from there"):
        Pair(pair.target.model, EarlyExit(1))


def test_sampled_texts_follow_the_target(make_model: MakeModel) -> None:
    pair = Pair(make_model("llama", vocabulary=3, hidden=16, layers=2, spread=0.4), EarlyExit(1))
    assert_texts_follow_the_target(SpeculativeDecoder(pair), Sampling(), 200, lambda number: {"draft_length": 2.0})


def scaled_embeddings(make_model: MakeModel) -> PreTrainedModel:
    """A model that scales what its embeddings give."""
    config = GraniteConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, embedding_multiplier=2.0, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return GraniteForCausalLM(config).eval()


def test_other_structures_and_depths_are_refused_with_a_way_out(make_model: MakeModel, pair: Pair) -> None:
    for family in ("gpt2", "gpt_neox", "opt"):
        with pytest.raises(
            UnsupportedModelError, match=r"cannot be left early: .*plain stack of decoder layers.*lm_head"
        ):
            Pair(make_model(family), EarlyExit(1))
    with pytest.raises(
        UnsupportedModelError, match=r"first 1 layers: it gives other logits.*plain stack.*another draft"
    ):
        Pair(scaled_embeddings(make_model), EarlyExit(1))
    for layers in (0, 4, 1.5):
        with pytest.raises(ArgumentError, match=r"early-exit layers of .* must be a whole number"):
            ExitModel(pair.target, layers)  # type: ignore[arg-type]


def test_a_pair_may_name_an_early_exit_alone_or_among_others() -> None:
    plain = load_pair("tiny-3m")
    expected = AutoregressiveDecoder(plain).generate("And it came to pass", max_new_tokens=24).tokens
    for name in ("early-exit:4", "early-exit:4,ngram"):
        pair = load_pair(f"tiny-3m+{name}")
        assert pair.target.model is plain.target.model
        assert pair.draft is not None
        assert (pair.name, pair.draft.name) == (f"tiny-3m+{name}", name)
        generation = SpeculativeDecoder(pair).generate("And it came to pass", max_new_tokens=24)
        assert generation.tokens == expected
        assert sum(round_.accepted for round_ in generation.rounds) > 0
    with pytest.raises(ArgumentError, match=r"early-exit layers of tiny-3m must be a whole number from 1 to 5, got 6"):
        load_pair("tiny-3m+early-exit:6")


def test_a_table_may_draft_for_an_early_exit() -> None:
    pair = load_pair("tiny-3m+early-exit:3:drafted-by-ngram")
    with tokens_counted(pair.target.model) as counts:
        generation = SpeculativeDecoder(pair).generate([5, 6, 7, 8], max_new_tokens=24, knobs={"draft_length": 4})
    assert (
        generation.tokens
        == AutoregressiveDecoder(load_pair("tiny-3m")).generate([5, 6, 7, 8], max_new_tokens=24).tokens
    )
    assert sum(round_.accepted for round_ in generation.rounds) > 0
    assert len({counts[layer] for layer in range(3)}) == 1
    # Wrong guesses are read by the first layers alone.
    assert counts[2] > counts[3] == 3 + sum(round_.drafted + 1 for round_ in generation.rounds)
