"""Drafts whose tokens are not their target's: what they read and propose, and the target's own text from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recipes.tokenizer import train_tokenizer
from specgym.decoding import (
    DraftTreeDecoder,
    LanguageModel,
    ModelDrafter,
    NGramDrafter,
    Pair,
    PromptLookupDrafter,
    Round,
    SpeculativeDecoder,
    ThresholdDecoder,
    VocabularyMismatchError,
    draft_digest,
    load_pair,
)
from specgym.decoding.drafts.translated import TranslatedModel
from specgym.decoding.drafts.translation import Translation, Vocabulary
from specgym.decoding.models.kv_cache import TokenTree
from tests.helpers.other_words import SPELLED, draft_words, target_words, translated, word_tokenizer
from tests.helpers.table_models import TableModel, random_table

MakeModel = Callable[..., PreTrainedModel]
Reference = Callable[..., list[list[int]]]
COUNT = 24


def sentence_pieces(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the conventions of SentencePiece: a letter for the space, and bytes by their numbers."""
    pieces = {piece: number for number, piece in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_tokens_of_two_conventions_are_matched_by_their_bytes() -> None:
    bytes_ = {"<|begin|>": 0, "Ġthe": 1, "Ċ": 2, "Ã©": 3, "the": 4, "ĠtheĊ": 5, "Ð": 6}
    tokenizer = Tokenizer(models.BPE(bytes_, []))
    tokenizer.decoder = decoders.ByteLevel()
    target = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>")
    draft = sentence_pieces("<unk>", "<s>", "▁the", "<0x0A>", "é", "the", "<0xE9>")
    translation = Translation(Vocabulary(target, 8), Vocabulary(draft, 7))
    assert translation.ids.tolist() == [1, 2, 3, 4, 5, -1, -1, -1]  # begin is matched by its role
    assert translation.pieces(5) == (2, 3)
    assert translation.pieces(6) == translation.pieces(7) == (0,)  # the draft has no such byte, and no such row
    assert (translation.common, translation.complete) == (5, False)
    scores = translation.scores(torch.arange(7.0).unsqueeze(0))[0]
    assert scores.tolist() == [1, 2, 3, 4, 5, *[torch.finfo(torch.float32).min] * 3]


def test_special_tokens_are_none_of_the_text_that_names_them() -> None:
    target, draft = (word_tokenizer(["<unk>", "<end>", "word"]) for _ in range(2))
    target.add_tokens([AddedToken("<end>", special=True), AddedToken("<user>", special=True)], special_tokens=True)
    translation = Translation(Vocabulary(target, 4), Vocabulary(draft, 3))
    assert translation.ids.tolist() == [0, -1, 2, -1]
    assert translation.pieces(1) == (1,)
    assert translation.pieces(3) == (0,)


def test_no_token_of_the_draft_stands_for_two() -> None:
    target = sentence_pieces("<unk>", "<s>", "<0x41>", "A", "b")
    draft = sentence_pieces("<unk>", "<s>", "b", "A")
    ids = Translation(Vocabulary(target, 5), Vocabulary(draft, 4)).ids.tolist()
    assert ids == [0, 1, -1, 3, 2]


def test_tokens_that_the_draft_lacks_are_spelled(tokenizer: PreTrainedTokenizerBase) -> None:
    other = train_tokenizer(["some other text of some others, the text"], 280)
    translation = Translation(Vocabulary(tokenizer, 310), Vocabulary(other, 280))
    text = "the draft token and the model\n of spec"
    for token in tokenizer(text)["input_ids"]:
        assert other.decode(list(translation.pieces(token))) == tokenizer.decode([token])
    assert translation.begin == ()


def test_texts_begin_as_the_drafts_do() -> None:
    target, draft = word_tokenizer(["a", "b"]), word_tokenizer(["a", "<s>", "b"])
    draft.add_special_tokens({"bos_token": "<s>"})
    assert Translation(Vocabulary(target, 2), Vocabulary(draft, 3)).begin == ()  # nor do its own
    draft.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    model = TranslatedModel(TableModel(random_table(3, 0)), Translation(Vocabulary(target, 2), Vocabulary(draft, 3)))
    for read in (lambda: model.read([1, 0]), lambda: model.forward(torch.tensor([1, 0]))):
        read()
        assert model._inner.seen == [1, 2, 0]  # type: ignore[attr-defined]
        assert model.room([1, 0, 1]) == 10_000 - 4
        model.truncate(0)
        assert model.room([1, 0, 1]) == 10_000 - 4


class Model:
    """A translated table beside one that reads everything anew, to which it must be equal."""

    def __init__(self) -> None:
        self.table = TableModel(random_table(6, 0))
        self.model = translated(self.table, 4)
        self.text: list[int] = []

    def check(self) -> None:
        """Both have read the same."""
        seen = self.model._inner.seen  # type: ignore[attr-defined]
        assert seen == [piece for token in self.text for piece in self.model.translation.pieces(token)]
        assert self.model.length == len(self.text)
        assert self.model.room([*self.text, SPELLED]) == self.table.context_limit - len(seen) - 2

    def scores(self, text: Sequence[int]) -> torch.Tensor:
        """Scores after each token of a text that follows what was read."""
        inner, result = self.table.fresh(), []
        for token in [*self.text, *text]:
            pieces = torch.tensor(self.model.translation.pieces(token))
            result.append(self.model.translation.scores(inner.forward(pieces).scores)[-1])
        return torch.stack(result[len(self.text) :])


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(prompt=tokens, moves=st.lists(st.tuples(st.integers(0, 3), tokens, st.integers(0, 8)), max_size=6))
def test_what_is_in_the_cache_is_the_text_whatever_was_read_and_taken_back(
    prompt: list[int], moves: list[tuple[int, list[int], int]]
) -> None:
    both = Model()
    both.model.read(prompt)
    both.text = list(prompt)
    for kind, new, number in moves:
        if kind == 0:
            scores = both.model.forward(torch.tensor(new)).scores
            torch.testing.assert_close(scores, both.scores(new))
            both.text += new
        elif kind == 1:
            last = number % len(new) + 1
            scores = both.model.forward(torch.tensor(new), last=last).scores
            torch.testing.assert_close(scores, both.scores(new)[-last:])
            both.text += new
        elif kind == 2:
            both.model.read(new)
            both.text += new
        else:
            both.model.truncate(number)
            both.text = both.text[:number]
        both.check()


def test_the_nodes_of_a_tree_may_be_spelled() -> None:
    both = Model()
    nodes = [0, SPELLED, SPELLED, 2, 3]
    paths = [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4]]
    model = both.model
    scores = model.forward(torch.tensor(nodes[:3]), TokenTree([-1, 0, 0])).scores
    grown = model.forward(torch.tensor(nodes[3:]), TokenTree([-1, 0, 0, 2, 2]), rows=torch.tensor([1, 0])).scores
    for path, row in zip(paths, [*scores, grown[1], grown[0]], strict=True):
        torch.testing.assert_close(row, both.scores([nodes[node] for node in path])[-1])
    model.keep([0, 2, 4])
    both.text = [0, SPELLED, 3]
    both.check()


@pytest.fixture(scope="module")
def twins(make_model: MakeModel, make_noisy: MakeModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target of `COUNT` words, and a draft of other ones that often agrees with it."""
    target: Any = make_model("llama", vocabulary=COUNT)
    draft: Any = make_model("llama", vocabulary=COUNT + 5)
    draft.model.layers = make_noisy(target, 0.05).model.layers
    order = torch.tensor([*range(COUNT)][::-1] + [SPELLED] * 5)
    with torch.no_grad():
        for ours, theirs in ((target.model.embed_tokens, draft.model.embed_tokens), (target.lm_head, draft.lm_head)):
            theirs.weight.copy_(ours.weight[order])
    return target, draft


def tokenizers_of_twins() -> dict[str, Any]:
    return {
        "tokenizer": word_tokenizer(target_words(COUNT)),
        "draft_tokenizer": word_tokenizer(draft_words(COUNT)),
    }


@pytest.mark.parametrize("kind", [SpeculativeDecoder, ThresholdDecoder, DraftTreeDecoder])
def test_greedy_text_is_the_targets_own(
    twins: tuple[PreTrainedModel, PreTrainedModel], reference: Reference, kind: Any
) -> None:
    pair = Pair(*twins, **tokenizers_of_twins())
    decoder = kind(pair, 4, "never") if kind is ThresholdDecoder else kind(pair)
    prompts = [[number, SPELLED, number + 1] for number in range(2, 5)]
    expected = reference(twins[0], prompts, 40)
    assert any(SPELLED in text for text in expected)
    knobs = {"fallback": 0.0} if kind is ThresholdDecoder else {}
    rounds = list[Round]()
    for prompt, text in zip(prompts, expected, strict=True):
        generation = decoder.generate(prompt, max_new_tokens=40, knobs=knobs)
        assert generation.tokens == text
        rounds += generation.rounds
    assert sum(round_.accepted for round_ in rounds) > 30
    assert any(round_.taken_back for round_ in rounds) or kind is DraftTreeDecoder


def test_a_draft_reads_only_what_is_new(twins: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pair = Pair(*twins, **tokenizers_of_twins())
    assert isinstance(pair.draft, ModelDrafter)
    read: list[int] = []
    inner: Any = pair.draft.model.__dict__["_inner"]
    forward = type(inner).forward

    class Counting(type(inner)):  # type: ignore[misc]
        def forward(self, tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            read.append(len(tokens))
            return forward(self, tokens, *arguments, **options)

    inner.__class__ = Counting
    generation = SpeculativeDecoder(pair).generate([2, SPELLED, 3] * 8, max_new_tokens=30, knobs={"draft_length": 3})
    assert len(read) > 20
    assert read[0] > 20  # the prompt
    assert max(read[1:]) <= 4  # the last drafted token and the target's own, each spelled at most
    assert len(generation.tokens) == 30


def test_a_full_context_ends_the_drafts_and_not_the_text(make_model: MakeModel, reference: Reference) -> None:
    target = make_model("llama", vocabulary=COUNT)
    draft = make_model("llama", vocabulary=COUNT + 2, context=20, seed=3)
    pair = Pair(target, draft, **tokenizers_of_twins())
    prompt = [SPELLED, 2, SPELLED]
    (expected,) = reference(target, [prompt], 30)
    for decoder in (SpeculativeDecoder(pair), DraftTreeDecoder(pair)):
        assert decoder.generate(prompt, max_new_tokens=30).tokens == expected
        assert decoder.generate([SPELLED] * 12, max_new_tokens=9).tokens  # too long for the draft, spelled


@pytest.mark.parametrize(("ours", "theirs"), [(COUNT + 9, COUNT), (COUNT, COUNT + 9), (COUNT + 4, COUNT + 2)])
@pytest.mark.parametrize("tokenizers", [1, 2])
def test_padding_of_either_side_changes_nothing(
    make_model: MakeModel, make_noisy: MakeModel, reference: Reference, ours: int, theirs: int, tokenizers: int
) -> None:
    largest = make_model("llama", vocabulary=COUNT + 9)
    target, draft = make_model("llama", vocabulary=ours), make_model("llama", vocabulary=theirs)
    with torch.no_grad():
        for model, noise in ((target, 0.0), (draft, 0.05)):
            state = make_noisy(largest, noise).state_dict()
            rows = model.config.vocab_size
            model.load_state_dict({name: w[:rows] if len(w) == COUNT + 9 else w for name, w in state.items()})
    known = [word_tokenizer(target_words(COUNT)) for _ in range(tokenizers)]
    options: dict[str, Any] = dict(zip(("tokenizer", "draft_tokenizer"), known, strict=False))
    with pytest.raises(VocabularyMismatchError, match="only their tokenizers can tell"):
        Pair(target, draft)
    pair = Pair(target, draft, **options)
    prompt = [3, 1, 5]
    (expected,) = reference(target, [prompt], 40)
    for decoder in (SpeculativeDecoder(pair), DraftTreeDecoder(pair)):
        generation = decoder.generate(prompt, max_new_tokens=40)
        assert generation.tokens == expected
        assert any(round_.accepted for round_ in generation.rounds)


def test_an_added_token_of_either_side_is_no_reason_to_refuse(make_model: MakeModel, reference: Reference) -> None:
    plain, chat = (word_tokenizer(target_words(COUNT)) for _ in range(2))
    chat.add_tokens([AddedToken("<user>", special=True)], special_tokens=True)
    for ours, theirs in ((plain, chat), (chat, plain)):
        target, draft = (make_model("llama", vocabulary=len(side)) for side in (ours, theirs))
        pair = Pair(target, draft, ours, draft_tokenizer=theirs)
        prompt = [2, len(ours) - 1, 4]
        (expected,) = reference(target, [prompt], 20)
        assert SpeculativeDecoder(pair).generate(prompt, max_new_tokens=20).tokens == expected


def test_tables_and_copies_serve_padded_targets(make_model: MakeModel) -> None:
    target, tokenizer = make_model("llama", vocabulary=COUNT + 9), word_tokenizer(target_words(COUNT))
    for size in (COUNT, COUNT + 9, COUNT + 64):
        for draft in (PromptLookupDrafter(size), NGramDrafter.fit([[1, 2, 3]], size)):
            assert Pair(target, draft, tokenizer).draft is draft
    other_size = r"the target's tokenizer knows 24: .* padded alike\. Make one"
    for size in (COUNT - 1, COUNT + 2000):
        with pytest.raises(VocabularyMismatchError, match=other_size):
            Pair(target, PromptLookupDrafter(size), tokenizer)
    beyond = NGramDrafter.fit([[1, COUNT + 20]], COUNT + 64)
    with pytest.raises(VocabularyMismatchError, match=r"of 33 tokens .* the draft proposes token 44"):
        Pair(target, beyond, tokenizer)


def test_what_cannot_be_told_apart_is_refused_with_the_reason(make_model: MakeModel) -> None:
    target, draft = make_model("llama", vocabulary=COUNT), make_model("llama", vocabulary=2000)
    tokenizer, other = word_tokenizer(target_words(COUNT)), word_tokenizer([f"v{number}" for number in range(2000)])
    with pytest.raises(VocabularyMismatchError, match=r"tokenizer knows 24: .* Give the draft's tokenizer"):
        Pair(target, draft, tokenizer)
    with pytest.raises(VocabularyMismatchError, match=r"have 1 tokens .* \(token 0 is 'w0' to the target and 'v0'"):
        Pair(target, draft, tokenizer, draft_tokenizer=other)


def test_recordings_of_other_translations_are_told_apart() -> None:
    table = TableModel(random_table(6, 0))
    table.model = torch.nn.Linear(2, 2)
    plain = ModelDrafter(table)
    digests = {draft_digest(plain), *(draft_digest(ModelDrafter(translated(table, count))) for count in (3, 4, 4))}
    assert len(digests) == 3


def test_a_pair_is_loaded_with_the_tokenizers_of_both(
    tmp_path: Path, twins: tuple[PreTrainedModel, PreTrainedModel], reference: Reference
) -> None:
    for model, tokenizer, name in zip(twins, tokenizers_of_twins().values(), ("target", "draft"), strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pair = load_pair(f"{tmp_path / 'target'}+{tmp_path / 'draft'}", offline=True, device="cpu")
    assert isinstance(pair.draft, ModelDrafter)
    assert isinstance(pair.draft.model, TranslatedModel)
    assert isinstance(pair.draft.model.fresh(), LanguageModel)
    generation = SpeculativeDecoder(pair).generate("w3 xy w4", max_new_tokens=20)
    assert generation.tokens == reference(twins[0], [[3, SPELLED, 4]], 20)[0]
    assert pair.without_draft().draft is None
    assert Pair(pair.target, pair.draft, pair.tokenizer).draft is pair.draft
