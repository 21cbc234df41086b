"""What the three drafts propose, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from specgym.decoding.autoregressive import AutoregressiveDecoder
from specgym.decoding.drafters import ModelDrafter, Proposal
from specgym.decoding.models import LanguageModel
from specgym.decoding.ngram import NGramDrafter
from specgym.decoding.pairs import Pair
from specgym.decoding.prompt_lookup import PromptLookupDrafter
from specgym.decoding.sampling import Sampling
from specgym.decoding.speculative import SpeculativeDecoder

CPU = torch.device("cpu")


def propose(drafter: ModelDrafter | NGramDrafter | PromptLookupDrafter, text: list[int], count: int) -> list[int]:
    session = drafter.start(text, Sampling(0.0), torch.Generator(), CPU)
    return session.propose(text, count).tokens.tolist()


def test_prompt_lookup_copies_what_followed_the_longest_and_latest_match() -> None:
    drafter = PromptLookupDrafter(100, longest=2)
    assert propose(drafter, [1, 2, 3, 9, 2, 4, 1, 2], 3) == [3, 9, 2]  # two tokens match before one does
    assert propose(drafter, [5, 7, 5, 8, 5], 2) == [8, 5]  # of equal matches the latest
    assert propose(drafter, [1, 2, 3], 4) == []
    assert propose(drafter, [4, 4], 5) == [4]  # a text that has just begun to repeat


def test_prompt_lookup_indexes_a_growing_text_as_if_it_had_come_at_once() -> None:
    text = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    drafter = PromptLookupDrafter(4)
    growing = drafter.start(text[:1], Sampling(0.0), torch.Generator(), CPU)
    for length in range(1, len(text) + 1):
        assert growing.propose(text[:length], 5).tokens.tolist() == propose(drafter, text[:length], 5)


def test_prompt_lookup_needs_a_match_of_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="longest must be at least 1"):
        PromptLookupDrafter(100, longest=0)


@given(text=st.lists(st.integers(0, 3), min_size=8, max_size=40), order=st.integers(2, 4))
def test_an_ngram_table_gives_a_commonest_continuation_of_the_longest_known_context(
    text: list[int], order: int
) -> None:
    table = NGramDrafter.fit([text], 4, order)
    for place in range(1, len(text)):
        context = text[:place]
        for length in range(min(order - 1, place), 0, -1):
            end = context[-length:]
            followers = [text[i + length] for i in range(len(text) - length) if text[i : i + length] == end]
            if followers:
                guess = table.next_token(context)
                assert followers.count(guess) == max(map(followers.count, followers))
                break


def test_an_ngram_table_backs_off_and_ends_where_it_knows_nothing() -> None:
    table = NGramDrafter.fit([[1, 2, 3, 4]], 10, order=3)
    assert propose(table, [9, 2], 8) == [3, 4]  # (9, 2) is unknown, 2 is known; nothing follows 4
    assert propose(table, [7], 8) == []
    assert table.next_token([]) is None


def test_no_ngram_spans_two_documents() -> None:
    table = NGramDrafter.fit([[1, 2], [3, 4]], 10, order=2)
    assert table.next_token([2]) is None


def test_rare_contexts_are_left_out_but_never_those_of_one_token() -> None:
    table = NGramDrafter.fit([[1, 2, 3], [5, 2, 3], [5, 2, 3]], 10, order=3, smallest_count=2)
    assert len(table) == len({(5, 2), (1,), (2,), (5,)})


def test_an_ngram_table_survives_saving(tmp_path: Path) -> None:
    text = torch.randint(0, 50, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    table = NGramDrafter.fit([text], 50)
    table.save(tmp_path / "mine.safetensors")
    again = NGramDrafter.load(tmp_path / "mine.safetensors")
    assert again.name == "mine"
    assert [again.next_token(text[:n]) for n in range(1, 100)] == [table.next_token(text[:n]) for n in range(1, 100)]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_damaged_or_foreign_table_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    NGramDrafter.fit([[1, 2, 3]], 10).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"table\.safetensors is damaged .*fit the table again"):
        NGramDrafter.load(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match=r"table\.safetensors is not an n-gram table"):
        NGramDrafter.load(path)
    with pytest.raises(ValueError, match=r"no n-gram table at .*missing\.safetensors"):
        NGramDrafter.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("texts", "vocabulary", "order", "message"),
    [
        ([[1, 2, 3]], 10, 1, "order must be at least 2"),
        ([[1, 2, 3]], 50_000, 5, r"50000\^order below 2\^63"),
        ([[1], []], 10, 3, "no document has two tokens"),
        ([[1, 11]], 10, 3, "outside the vocabulary of 10"),
    ],
)
def test_text_that_cannot_be_counted_is_refused(
    texts: list[list[int]], vocabulary: int, order: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NGramDrafter.fit(texts, vocabulary, order)


def test_a_model_drafts_what_it_would_generate(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    text = [3, 1, 4, 1, 5]
    expected = model.generate(  # type: ignore[operator]
        torch.tensor([text]), attention_mask=torch.ones(1, 5), do_sample=False, max_new_tokens=6, pad_token_id=0
    )[0, 5:].tolist()
    session = ModelDrafter(LanguageModel(model)).start(text, Sampling(0.0), torch.Generator(), CPU)
    proposal = session.propose(text, 6)
    assert proposal.tokens.tolist() == expected
    # After a rejection it goes on from the corrected text, after a full acceptance from two unread tokens.
    session.truncate(7)
    corrected = [*text, *expected[:2], 9]
    again: Proposal = session.propose(corrected, 3)
    fresh = ModelDrafter(LanguageModel(model)).start(corrected, Sampling(0.0), torch.Generator(), CPU)
    torch.testing.assert_close(again.logits, fresh.propose(corrected, 3).logits, atol=1e-4, rtol=1e-4)


def test_a_sampling_model_draft_reports_the_distribution_it_drew_from(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    sampling = Sampling(0.7, top_k=5)
    session = ModelDrafter(LanguageModel(make_model("gpt2"))).start([1, 2], sampling, torch.Generator(), CPU)
    proposal = session.propose([1, 2], 4)
    assert proposal.logits is not None
    assert proposal.probabilities is not None
    torch.testing.assert_close(proposal.probabilities, sampling.probabilities(proposal.logits))
    assert (proposal.probabilities.gather(-1, proposal.tokens.unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_ends_after_the_first_token_it_doubts(
    make_model: Callable[..., PreTrainedModel], temperature: float
) -> None:
    drafter = ModelDrafter(LanguageModel(make_model("llama")))

    def drafted(stop_below: float) -> Proposal:
        generator = torch.Generator().manual_seed(3)
        return drafter.start([1, 2, 3], Sampling(temperature), generator, CPU).propose([1, 2, 3], 12, stop_below)

    whole = drafted(0.0)
    assert whole.logits is not None
    confidence = whole.logits.softmax(-1).gather(-1, whole.tokens.unsqueeze(-1)).squeeze(-1)
    bound = float(confidence.median()) + 1e-4
    doubted = int((confidence < bound).nonzero()[0])
    assert drafted(bound).tokens.tolist() == whole.tokens[: doubted + 1].tolist()
    assert len(drafted(1.0).tokens) == 1


def test_ending_drafts_early_leaves_greedy_output_as_it_is(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    pair = Pair(model, make_model("llama", layers=1))
    expected = AutoregressiveDecoder(pair).generate([5, 6], max_new_tokens=40)
    decoder = SpeculativeDecoder(pair, stop_below=0.4)
    generation = decoder.generate([5, 6], max_new_tokens=40, knobs={"draft_length": 8})
    assert generation.tokens == expected.tokens
    assert {cycle.drafted for cycle in generation.rounds} - {8}
    with pytest.raises(ValueError, match="stop_below is a probability"):
        SpeculativeDecoder(pair, stop_below=1.5)
