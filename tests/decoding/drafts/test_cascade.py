"""Cascades propose what their model would have proposed alone, at the cost of fewer passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.drafts import cascade
from specgym.decoding.drafts.cascade import CascadeDrafter
from specgym.decoding.drafts.copying import PromptLookupDrafter, SuffixDrafter
from specgym.decoding.drafts.drafter import Drafter, DraftStep, ModelDrafter, ModelStep, OneHotStep
from specgym.decoding.drafts.mixed import MixedDraft
from specgym.decoding.drafts.ngram import NGramDrafter
from specgym.decoding.drafts.translated import TranslatedModel
from specgym.decoding.errors import VocabularyMismatchError
from specgym.decoding.loading.memory import memory_of
from specgym.decoding.loading.pair import Pair, load_pair
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.prompts import load_prompts
from specgym.decoding.sampling import Sampling, draw
from tests.helpers.known_distributions import exact_joint, p_value_of
from tests.helpers.other_words import target_words, translated_table, word_tokenizer

MakeTable = Callable[..., LanguageModel]
CPU = torch.device("cpu")
SAMPLINGS = [Sampling(0.0), Sampling(), Sampling(0.7, top_k=4)]


def random_text(vocabulary: int, length: int, seed: int = 0) -> list[int]:
    return list(torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def inner_drafts(vocabulary: int) -> list[Drafter]:
    table = NGramDrafter.fit([random_text(vocabulary, 300, seed=3)], vocabulary, order=3)
    return [table, PromptLookupDrafter(vocabulary, longest=2), SuffixDrafter(vocabulary, longest=3)]


def texts_of(drafter: Drafter, prompt: Sequence[int], sampling: Sampling, seed: int = 0) -> Iterator[list[int]]:
    """Drafts of rounds that keep some of it and go on otherwise, as verification does."""
    generator = torch.Generator().manual_seed(seed)
    session = drafter.start(prompt, sampling, generator, CPU)
    context, corrections = list(prompt), iter(random_text(drafter.vocabulary_size, 100, seed=9))
    for round_ in range(12):
        asked = 1 + round_ % 6
        drafted = [int(step.token) for step in islice(session.steps(context, asked), asked - round_ % 2)]
        yield drafted
        kept = drafted[: round_ % 4]
        session.truncate(len(context) + len(kept))
        context += [*kept, next(corrections)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "top-k"])
def test_a_cascade_drafts_what_its_model_drafts_alone_by_the_same_draws(
    make_table: MakeTable, sampling: Sampling
) -> None:
    prompt = random_text(6, 20)
    alone = ModelDrafter(make_table(6, seed=1, spread=2.0))
    for inner in inner_drafts(6):
        for length in (1, 3, 8):
            both = CascadeDrafter(alone, inner, length)
            assert list(texts_of(both, prompt, sampling)) == list(texts_of(alone, prompt, sampling)), (inner, length)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cascade_over_a_transformer_drafts_what_the_model_drafts_alone(
    make_model: Callable[..., PreTrainedModel], family: str
) -> None:
    alone = ModelDrafter(LanguageModel(make_model(family)))
    prompt = random_text(96, 12)
    for inner in inner_drafts(96):
        both = CascadeDrafter(alone, inner)
        assert list(texts_of(both, prompt, Sampling(0.0))) == list(texts_of(alone, prompt, Sampling(0.0)))


def test_a_cascade_of_another_tokenizer_drafts_what_its_model_drafts_alone() -> None:
    alone = ModelDrafter(translated_table(5, seed=2))
    prompt = random_text(5, 12)
    for inner in inner_drafts(5):
        for sampling in SAMPLINGS:
            both = CascadeDrafter(alone, inner)
            assert list(texts_of(both, prompt, sampling)) == list(texts_of(alone, prompt, sampling))


def test_a_cascade_whose_model_is_translated_stays_one(make_table: MakeTable) -> None:
    words = target_words(6)
    target, draft = make_table(6, seed=1), make_table(6, seed=2)
    both = CascadeDrafter(draft, SuffixDrafter(6, longest=3))
    pair = Pair(target, both, word_tokenizer(words), draft_tokenizer=word_tokenizer(words[::-1]))
    alone = Pair(target, draft, word_tokenizer(words), draft_tokenizer=word_tokenizer(words[::-1]))
    assert isinstance(pair.draft, CascadeDrafter)
    assert isinstance(pair.draft.model, TranslatedModel)
    assert both.model is draft
    prompt = random_text(6, 12)
    for sampling in SAMPLINGS:
        assert alone.draft is not None
        assert list(texts_of(pair.draft, prompt, sampling)) == list(texts_of(alone.draft, prompt, sampling))


def drafts(drafter: Drafter, prompt: Sequence[int], texts: int) -> dict[tuple[int, ...], int]:
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(texts):
        session = drafter.start(prompt, Sampling(), torch.Generator().manual_seed(seed), CPU)
        counts[tuple(int(step.token) for step in session.steps(prompt, 3))] += 1
    return counts


def test_what_a_cascade_drafts_is_distributed_as_its_model_has_it(make_table: MakeTable) -> None:
    model, prompt = make_table(4, seed=1), random_text(4, 20)
    expected = exact_joint(model, Sampling(), prompt, 3)
    both = CascadeDrafter(model, SuffixDrafter(4, longest=3))
    assert p_value_of(drafts(both, prompt, 1_000), expected) > 1e-3


def test_a_cascade_that_draws_anew_where_a_guess_fails_its_test_is_found_out(
    monkeypatch: pytest.MonkeyPatch, make_table: MakeTable
) -> None:
    model, prompt = make_table(4, seed=1), random_text(4, 20)

    class Wrong(cascade._CascadeSession):
        def _read(self, text: Sequence[int], guesses: Sequence[int]) -> Iterator[ModelStep]:
            for place, step in enumerate(super()._read(text, guesses)):
                row = step.probabilities
                assert row is not None
                if place < len(guesses) and int(step.token) != guesses[place]:  # its test failed
                    step = ModelStep(draw(row, self._generator), step.logits, row)
                yield step

    monkeypatch.setattr(cascade, "_CascadeSession", Wrong)
    expected = exact_joint(model, Sampling(), prompt, 3)
    both = CascadeDrafter(ModelDrafter(model), SuffixDrafter(4, longest=3))
    assert p_value_of(drafts(both, prompt, 1_000), expected) < 1e-6


def counting_passes(model: LanguageModel) -> list[int]:
    """Tokens of every pass of a session's model from now on."""
    passes: list[int] = []
    forward = model.forward

    def counted(tokens: Tensor, *rest: object, **options: object) -> object:
        passes.append(tokens.shape[0])
        return forward(tokens, *rest, **options)  # type: ignore[arg-type]

    model.forward = counted  # type: ignore[method-assign,assignment]
    return passes


def test_right_guesses_share_a_pass_and_wrong_ones_are_forgotten(make_table: MakeTable) -> None:
    table = make_table(5, seed=1)
    prompt = [1, 2, 3]
    alone = list(ModelDrafter(table).start(prompt, Sampling(0.0), torch.Generator(), CPU).steps(prompt, 6))
    right = [int(step.token) for step in alone]

    class Guesses:
        name, vocabulary_size, free = "guesses", 5, True

        def __init__(self, tokens: list[int]) -> None:
            self.tokens = tokens

        def start(self, *_: object) -> Guesses:
            return self

        def steps(self, context: Sequence[int], count: int) -> Iterator[DraftStep]:
            return map(OneHotStep, self.tokens[len(context) - len(prompt) :][:count])

        def truncate(self, length: int) -> None: ...

    for guesses, expected in (
        (right, [6]),  # the last token read, and five guesses for six tokens
        ([], [1] * 6),
        ([*right[:2], (right[2] + 1) % 5, *right[3:]], [6, 3]),  # the third is wrong; those after it go on
    ):
        both = CascadeDrafter(ModelDrafter(table), Guesses(guesses))
        session = both.start(prompt, Sampling(0.0), torch.Generator(), CPU)
        passes = counting_passes(session._model)  # type: ignore[attr-defined]
        assert [int(step.token) for step in session.steps(prompt, 6)] == right
        assert passes == expected


def test_a_cascade_left_in_the_middle_goes_on_after_tokens_of_others(make_table: MakeTable) -> None:
    prompt = random_text(5, 20)
    for sampling in SAMPLINGS:
        for left in range(1, 6):
            alone, both = (
                drafter.start(prompt, sampling, torch.Generator().manual_seed(3), CPU)
                for drafter in (
                    ModelDrafter(make_table(5, seed=1)),
                    CascadeDrafter(ModelDrafter(make_table(5, seed=1)), SuffixDrafter(5, longest=3)),
                )
            )
            for tail in ([], [0], [1, 2, 3, 4]):
                ways = []
                for session in (alone, both):
                    first = [int(step.token) for step in islice(session.steps(prompt, 6), left)]
                    after = [step.logits for step in islice(session.steps([*prompt, *first, *tail], 4), left)]
                    assert None not in after
                    ways.append((first, torch.cat([row for row in after if row is not None])))
                    session.truncate(len(prompt))
                assert ways[0][0] == ways[1][0]
                assert torch.equal(ways[0][1], ways[1][1])


def test_a_cascade_drafts_as_far_as_its_model_has_room(make_table: MakeTable) -> None:
    for context in (20, 21, 23, 26):
        table = make_table(3, seed=1, context=context)
        prompt = random_text(3, 20)
        session = CascadeDrafter(ModelDrafter(table), SuffixDrafter(3)).start(
            prompt, Sampling(0.0), torch.Generator(), CPU
        )
        assert len(list(session.steps(prompt, 9))) == min(9, context - 20 + 1)
    too_long = random_text(3, 30)
    session = CascadeDrafter(ModelDrafter(table), SuffixDrafter(3)).start(
        too_long, Sampling(0.0), torch.Generator(), CPU
    )
    assert list(session.steps(too_long, 3)) == []


def test_both_parts_and_the_length_are_in_the_digest(make_model: Callable[..., PreTrainedModel]) -> None:
    model, other = (LanguageModel(make_model(family)) for family in ("llama", "gpt2"))
    variants = [
        CascadeDrafter(model, SuffixDrafter(96)),
        CascadeDrafter(other, SuffixDrafter(96)),
        CascadeDrafter(model, SuffixDrafter(96, longest=4)),
        CascadeDrafter(model, PromptLookupDrafter(96)),
        CascadeDrafter(model, SuffixDrafter(96), length=4),
        ModelDrafter(model),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)
    assert CascadeDrafter(ModelDrafter(model), SuffixDrafter(96)).digest() == variants[0].digest()


def test_parts_that_make_no_cascade_are_refused_by_name(make_table: MakeTable) -> None:
    table = make_table(5, seed=1)
    with pytest.raises(ValueError, match=r"table cannot draft for table: .* a table or a look-up"):
        CascadeDrafter(ModelDrafter(table), ModelDrafter(table))
    with pytest.raises(VocabularyMismatchError, match=r"vocabulary of 5 tokens and suffix, which .* one of 6"):
        CascadeDrafter(ModelDrafter(table), SuffixDrafter(6))
    with pytest.raises(ValueError, match="must be a model that drafts alone"):
        CascadeDrafter(CascadeDrafter(table, SuffixDrafter(5)), SuffixDrafter(5))
    with pytest.raises(ValueError, match="must be a model that drafts alone"):
        CascadeDrafter(SuffixDrafter(5), SuffixDrafter(5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be a whole number"):
        CascadeDrafter(table, SuffixDrafter(5), length=0)


def test_a_cascade_is_loaded_by_name_and_shares_the_model_with_the_draft_alone() -> None:
    pair = load_pair("tiny-10m+tiny-10m-draft-1l:drafted-by-ngram,tiny-10m-draft-1l:drafted-by-suffix,prompt-lookup")
    assert isinstance(pair.draft, MixedDraft)
    by_table, by_suffix, _ = pair.draft.drafts
    assert [draft.name for draft in pair.draft.drafts] == [
        "tiny-10m-draft-1l:drafted-by-ngram",
        "tiny-10m-draft-1l:drafted-by-suffix",
        "prompt-lookup",
    ]
    assert isinstance(by_table, CascadeDrafter)
    assert isinstance(by_suffix, CascadeDrafter)
    alone = load_pair("tiny-10m+tiny-10m-draft-1l").draft
    assert isinstance(alone, ModelDrafter)
    assert len({draft.model.model for draft in (alone, by_table, by_suffix)}) == 1
    prompt = pair.encode(load_prompts("code").train[0])[:60]
    text = AutoregressiveDecoder(pair.without_draft()).generate(prompt, max_new_tokens=12).tokens
    assert list(texts_of(by_suffix, prompt, Sampling(0.0))) == list(texts_of(alone, prompt, Sampling(0.0)))
    for draft in (by_table, by_suffix):
        assert SpeculativeDecoder(Pair(pair.target, draft)).generate(prompt, max_new_tokens=12).tokens == text
    assert by_table.nbytes > 1_000_000
    assert memory_of(pair).draft >= by_table.nbytes
