"""Proposals and refusals of models and tables as drafts."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from specgym.decoding.drafts.copying import PromptLookupDrafter
from specgym.decoding.drafts.drafter import Drafter, DraftStep, ModelDrafter, ModelStep, OneHotStep, Proposal, propose
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.latency.batch_grid import StopwatchDrafter
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.sampling import Sampling

CPU = torch.device("cpu")
GREEDY = Sampling(0.0)


def steps(drafter: Drafter, text: list[int], count: int, sampling: Sampling = GREEDY) -> list[DraftStep]:
    generator = torch.Generator().manual_seed(3)
    return list(drafter.start(text, sampling, generator, CPU).steps(text, count))


def drafted(drafter: Drafter, text: list[int], count: int) -> list[int]:
    return [int(step.token) for step in steps(drafter, text, count)]


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
                assert guess is not None
                assert followers.count(guess) == max(map(followers.count, followers))
                break


def test_an_ngram_table_backs_off_and_ends_where_it_knows_nothing() -> None:
    table = NGramDrafter.fit([[1, 2, 3, 4]], 10, order=3)
    assert drafted(table, [9, 2], 8) == [3, 4]  # (9, 2) is unknown, 2 is known; nothing follows 4
    assert drafted(table, [7], 8) == []
    assert table.next_token([]) is None


@pytest.mark.parametrize(("vocabulary", "largest"), [(3, 40), (4096, 6), (55_109, 4), (128_256, 4), (2_097_151, 4)])
def test_the_largest_order_looks_as_far_back_as_it_says(vocabulary: int, largest: int) -> None:
    end = list(range(vocabulary - largest, vocabulary)) if vocabulary > largest else [*[0, 1, 2, 1] * 10]
    table = NGramDrafter.fit([end, [0, *end[1:-1], 1]], vocabulary, largest)
    assert table.next_token(end[:-1]) == end[-1]
    assert table.next_token([0, *end[1:-1]]) == 1
    with pytest.raises(ValueError, match=f"order must be 2 to {largest} for a vocabulary of {vocabulary} tokens"):
        NGramDrafter.fit([end], vocabulary, largest + 1)


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
        ([[1, 2, 3]], 10, 1, "order must be 2 to 19 for"),
        ([[1, 2, 3]], 50_000, 6, r"order must be 2 to 5 for a vocabulary of 50000 tokens .* got 6"),
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
    proposal = propose(session, text, 6)
    assert proposal.tokens.tolist() == expected
    # After a rejection it goes on from the corrected text, after a full acceptance from two unread tokens.
    session.truncate(7)
    corrected = [*text, *expected[:2], 9]
    again = propose(session, corrected, 3)
    fresh = ModelDrafter(LanguageModel(model)).start(corrected, Sampling(0.0), torch.Generator(), CPU)
    torch.testing.assert_close(again.logits, propose(fresh, corrected, 3).logits, atol=1e-4, rtol=1e-4)


def test_a_sampling_model_draft_reports_the_distribution_it_drew_from(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    sampling = Sampling(0.7, top_k=5)
    session = ModelDrafter(LanguageModel(make_model("gpt2"))).start([1, 2], sampling, torch.Generator(), CPU)
    proposal = propose(session, [1, 2], 4)
    assert proposal.logits is not None
    assert proposal.probabilities is not None
    torch.testing.assert_close(proposal.probabilities, sampling.probabilities(proposal.logits))
    assert (proposal.probabilities.gather(-1, proposal.tokens.unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.8), Sampling(1.3, top_k=4)])
def test_a_model_is_as_sure_as_the_distribution_it_drew_from(
    make_model: Callable[..., PreTrainedModel], sampling: Sampling
) -> None:
    for step in steps(ModelDrafter(LanguageModel(make_model("llama"))), [1, 2, 3], 6, sampling):
        assert step.logits is not None
        row = step.logits.softmax(-1) if sampling.greedy else step.probabilities
        assert row is not None
        assert step.confidence() == pytest.approx(float(row.max()), abs=1e-6)
        assert step.entropy() == pytest.approx(float(torch.special.entr(row.double()).sum()), abs=1e-4)


def test_tokens_that_cannot_follow_add_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    assert ModelStep(torch.tensor([0]), logits).entropy() == pytest.approx(math.log(2))
    certain = ModelStep(torch.tensor([0]), logits, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert (certain.confidence(), certain.entropy()) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_model_is_sure_of_nothing(value: float) -> None:
    for probabilities in (None, torch.full((1, 8), math.nan)):
        step = ModelStep(torch.tensor([0]), torch.full((1, 8), value), probabilities)
        assert (step.confidence(), step.entropy()) == (0, math.log(8))


def test_a_one_hot_draft_is_as_sure_as_its_match_is_long() -> None:
    lookup = PromptLookupDrafter(100, longest=2)
    assert [step.confidence() for step in steps(lookup, [1, 2, 3, 9, 2, 4, 1, 2], 3)] == [1, 1, 1]
    assert [step.confidence() for step in steps(lookup, [5, 7, 5, 8, 5], 2)] == [0.5, 0.5]
    table = NGramDrafter.fit([[1, 2, 3, 4, 5]], 10, order=4)
    shares = [step.confidence() for step in steps(table, [9, 2], 8)]
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])  # 2 alone is known, then (2, 3), then (2, 3, 4)
    assert all(step.entropy() == 0 for step in steps(table, [9, 2], 8))


def test_a_model_reads_no_further_than_it_is_asked(make_table: Callable[..., LanguageModel]) -> None:
    model = make_table(8, seed=1)
    session = ModelDrafter(model).start([1, 2, 3], Sampling(0.0), torch.Generator(), CPU)
    reading = session._model  # type: ignore[attr-defined]
    unfinished = session.steps([1, 2, 3], 5)
    assert reading.length == 2
    for number in range(1, 4):
        next(unfinished)
        assert reading.length == 2 + number


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_was_left_does_not_disturb_the_next(
    make_table: Callable[..., LanguageModel], temperature: float
) -> None:
    text = [1, 2, 3]
    for left in range(4):
        generator = torch.Generator()
        session = ModelDrafter(make_table(8, seed=1)).start(text, Sampling(temperature), generator, CPU)
        list(islice(session.steps(text, 5), left))
        generator.manual_seed(7)
        again = propose(session, text, 5)
        generator.manual_seed(7)
        fresh = propose(ModelDrafter(make_table(8, seed=1)).start(text, Sampling(temperature), generator, CPU), text, 5)
        assert again.tokens.tolist() == fresh.tokens.tolist()


def test_a_draft_keeps_no_gradients_and_leaves_the_mode_of_whoever_asks(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    session = ModelDrafter(LanguageModel(make_model("llama"))).start([1, 2], Sampling(0.0), torch.Generator(), CPU)
    for step in session.steps([1, 2], 3):
        assert not torch.is_inference_mode_enabled()
        assert step.logits is not None
        assert not step.logits.requires_grad
    with torch.inference_mode():
        next(session.steps([1, 2], 3))
        assert torch.is_inference_mode_enabled()


def test_steps_are_put_together_in_order() -> None:
    proposal = Proposal.of([OneHotStep(4), OneHotStep(2, 0.5)], CPU)
    assert (proposal.tokens.tolist(), proposal.logits, proposal.probabilities) == ([4, 2], None, None)
    assert proposal.tokens.dtype == torch.int64
    assert Proposal.of([], CPU).tokens.shape == (0,)
    rows = torch.arange(6.0).reshape(2, 1, 3)
    greedy = Proposal.of([ModelStep(torch.tensor([number]), rows[number]) for number in range(2)], CPU)
    assert greedy.tokens.tolist() == [0, 1]
    assert torch.equal(greedy.logits, rows[:, 0])  # type: ignore[arg-type]
    assert greedy.probabilities is None
    sampled = Proposal.of([ModelStep(torch.tensor([number]), rows[number], rows[1 - number]) for number in (0, 1)], CPU)
    assert torch.equal(sampled.probabilities, rows[[1, 0], 0])  # type: ignore[arg-type]


def test_a_stopwatch_fills_up_the_drafts_of_a_table_alone(make_table: Callable[..., LanguageModel]) -> None:
    watch = StopwatchDrafter(NGramDrafter.fit([[1, 2, 3]], 8, order=2))
    watch.length = 5
    assert (drafted(watch, [1], 9), watch.drafted) == ([2, 3, 0, 0, 0], 2)
    watch = StopwatchDrafter(ModelDrafter(make_table(8, seed=1, context=3)))
    watch.length = 5
    assert (len(drafted(watch, [1, 2], 9)), watch.drafted) == (2, 2)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_confidence_is_the_same_alone_and_with_the_entropy(sampled: bool) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    step, other = (
        ModelStep(torch.tensor([0]), logits, (logits / 2).softmax(-1) if sampled else None) for _ in range(2)
    )
    other.entropy()
    assert step.confidence() == pytest.approx(other.confidence(), rel=1e-6)
