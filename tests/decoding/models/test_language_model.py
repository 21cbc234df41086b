"""LanguageModel: span by span, by trees, cut back and grown, it gives what the untouched model gives in one pass."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

from specgym.decoding import LookaheadDecoder, Pair
from specgym.decoding.errors import NumericalError, PromptError, UnsupportedModelError
from specgym.decoding.models.kv_cache import TokenTree
from specgym.decoding.models.language_model import LanguageModel
from specgym.decoding.models.linear_layers import PrepackedLinear, prepack_linears
from specgym.decoding.models.output_layer import output_layer_watched

FAMILIES = ("llama", "opt", "gpt2", "qwen2", "gpt_neox", "phi", "mistral")
KINDS = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]
MakeModel = Callable[..., PreTrainedModel]


def plain(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """One pass of the stock model over all tokens, without a cache."""
    with torch.inference_mode():
        return model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0].float()


def some_tokens(count: int, seed: int = 0, vocabulary: int = 96) -> Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def random_parents(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(-1, node) for node in range(count)]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance * float(expected.std()), rtol=tolerance)


@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_spans_trees_kept_paths_and_cuts_equal_one_plain_pass(
    make_model: MakeModel, family: str, attention: str
) -> None:
    stock = make_model(family, attention=attention)
    model = LanguageModel(stock, prepack=False)
    tokens = some_tokens(40)
    expected = plain(stock, tokens)

    rows, place = [], 0
    for size in (1, 7, 2, 1, 12, 17):
        rows.append(model.forward(tokens[place : place + size]).scores)
        place += size
    close(torch.cat(rows), expected)
    assert model.length == 40

    model.truncate(25)
    assert model.length == 25
    close(model.forward(tokens[25:30], last=2).scores, expected[28:30])

    for seed in range(3):  # a tree after 25 tokens, one path of it kept, then more tokens
        model.truncate(25)
        tree = TokenTree(random_parents(12, seed))
        nodes = some_tokens(12, seed + 10)
        scores = model.forward(nodes, tree).scores
        for node in range(12):
            path = torch.cat([tokens[:25], nodes[tree.path(node)]])
            close(scores[node], plain(stock, path)[-1])
        deepest = int(tree.depths.argmax())
        model.keep(tree.path(deepest))
        kept = torch.cat([tokens[:25], nodes[tree.path(deepest)]])
        assert model.length == len(kept)
        after = some_tokens(3, seed + 20)
        close(model.forward(after).scores, plain(stock, torch.cat([kept, after]))[-3:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_grown_over_several_passes_equals_the_tree_read_at_once(make_model: MakeModel, family: str) -> None:
    stock = make_model(family)
    tokens, nodes = some_tokens(9), some_tokens(12, 1)
    parents = random_parents(12, 5)
    expected_model = LanguageModel(stock, prepack=False)
    expected_model.forward(tokens)
    expected = expected_model.forward(nodes, TokenTree(parents)).scores
    model = LanguageModel(stock, prepack=False)
    model.forward(tokens)
    rows = [
        model.forward(nodes[start:end], TokenTree(parents[:end])).scores
        for start, end in ((0, 3), (3, 4), (4, 10), (10, 12))
    ]
    close(torch.cat(rows), expected)
    path = TokenTree(parents).path(11)
    model.keep(path)
    after = some_tokens(2, 3)
    close(model.forward(after).scores, plain(stock, torch.cat([tokens, nodes[path], after]))[-2:])


def test_a_tree_smaller_than_its_new_tokens_or_larger_than_the_cache_is_refused(make_model: MakeModel) -> None:
    model = LanguageModel(make_model("llama"), prepack=False)
    model.forward(some_tokens(2))
    for tree in (TokenTree.chain(2), TokenTree.chain(6)):
        with pytest.raises(ValueError, match="cannot end in 3 new tokens after 2"):
            model.forward(some_tokens(3), tree)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_rows_that_are_asked_for_come_back_and_all_tokens_are_read(make_model: MakeModel, family: str) -> None:
    stock = make_model(family)
    tokens, nodes = some_tokens(9), some_tokens(12, 1)
    tree = TokenTree(random_parents(12, 5))
    model = LanguageModel(stock, prepack=False)
    expected = model.forward(tokens).scores
    expected_of_tree = model.forward(nodes, tree).scores
    for target_value in ([0], [8], [2, 3, 7], [5, 1], list(range(9)), []):
        model.truncate(0)
        scores = model.forward(tokens, rows=torch.tensor(target_value, dtype=torch.int64)).scores
        assert scores.shape == (len(target_value), 96)
        assert scores.dtype == torch.float32
        assert model.length == 9
        if target_value:
            close(scores, expected[target_value])
    scores = model.forward(nodes, tree, rows=torch.tensor([0, 4, 11])).scores
    close(scores, expected_of_tree[[0, 4, 11]])
    path = tree.path(11)
    model.keep(path)
    after = some_tokens(2, 3)
    close(model.forward(after).scores, plain(stock, torch.cat([tokens, nodes[path], after]))[-2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_after_the_final_norm(make_model: MakeModel, family: str) -> None:
    stock = make_model(family)
    output = LanguageModel(stock, prepack=False).forward(some_tokens(5), hidden=True)
    assert output.hidden is not None
    assert output.hidden.shape == (5, 32)
    with torch.inference_mode():
        close(stock.get_output_embeddings()(output.hidden).float(), output.scores)


def test_hidden_states_of_a_pass_are_not_those_that_another_thread_reads(make_model: MakeModel) -> None:
    model = make_model("llama")
    with output_layer_watched(model, True) as states:
        other = threading.Thread(target=model, args=(some_tokens(2)[None],))
        other.start()
        other.join()
        model(some_tokens(3)[None])
    assert [read.shape[1] for read in states] == [3]


def test_asking_for_hidden_states_leaves_nothing_behind_in_the_model(make_model: MakeModel) -> None:
    with torch.inference_mode():
        expected = make_model("llama")(some_tokens(5)[None], output_hidden_states=True).hidden_states[-1][0]
    stock = make_model("llama")
    hidden = LanguageModel(stock, prepack=False).forward(some_tokens(5), hidden=True).hidden
    assert hidden is not None
    close(hidden, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stock.modules())
    pickle.dumps(stock)
    part = LanguageModel(stock, prepack=False).forward(some_tokens(5), last=2, hidden=True)
    assert part.hidden is not None
    assert part.hidden.shape[0] == part.scores.shape[0] == 2
    close(part.hidden, expected[-2:])


@pytest.mark.parametrize(("first", "second"), [(200, 100), (64, 65), (1, 300), (255, 1), (256, 1), (257, 64), (511, 2)])
def test_the_cache_grows_past_its_first_storage_and_long_strips_work(
    make_model: MakeModel, first: int, second: int
) -> None:
    stock = make_model("llama", context=1024)
    model = LanguageModel(stock, prepack=False)
    tokens = some_tokens(first + second + 3)
    expected = plain(stock, tokens)
    close(model.forward(tokens[:first]).scores, expected[:first])
    close(model.forward(tokens[first : first + second]).scores, expected[first : first + second])
    close(model.forward(tokens[first + second :]).scores, expected[-3:])


def test_a_tree_across_the_storage_border_keeps_its_path(make_model: MakeModel) -> None:
    stock = make_model("llama", context=1024)
    model = LanguageModel(stock, prepack=False)
    tokens, nodes = some_tokens(250), some_tokens(12, 1)
    tree = TokenTree(random_parents(12, 4))
    model.forward(tokens)
    model.forward(nodes, tree)
    path = tree.path(11)
    model.keep(path)
    after = some_tokens(2, 3)
    whole = torch.cat([tokens, nodes[path], after])
    close(model.forward(after).scores, plain(stock, whole)[-2:])


def test_keeping_nothing_restores_the_state_before_the_tree(make_model: MakeModel) -> None:
    stock = make_model("gpt2")
    model = LanguageModel(stock, prepack=False)
    tokens = some_tokens(10)
    model.forward(tokens[:8])
    model.forward(some_tokens(3, 5), TokenTree((-1, -1, 0)))
    model.keep([])
    close(model.forward(tokens[8:]).scores, plain(stock, tokens)[8:])


def test_texts_from_fresh_do_not_disturb_each_other(make_model: MakeModel) -> None:
    stock = make_model("qwen2")
    item = LanguageModel(stock, prepack=False)
    two = item.fresh()
    tokens, others = some_tokens(9), some_tokens(9, 1)
    item.forward(tokens[:5])
    two.forward(others[:7])
    close(item.forward(tokens[5:]).scores, plain(stock, tokens)[5:])
    close(two.forward(others[7:]).scores, plain(stock, others)[7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_close_to_float32(make_model: MakeModel, family: str) -> None:
    stock = make_model(family, spread=0.1)
    tokens = some_tokens(20)
    expected = plain(stock, tokens)
    model = LanguageModel(copy.deepcopy(stock).bfloat16())
    scores = torch.cat([model.forward(tokens[:11]).scores, model.forward(tokens[11:]).scores])
    assert scores.dtype == torch.float32
    assert float((scores - expected).abs().mean() / expected.std()) < 0.05


@pytest.mark.filterwarnings("ignore:the plain weight of a packed layer:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_prepacked_layers_compute_the_same_and_are_saved_as_plain_ones(
    make_model: MakeModel, family: str, tmp_path: Path
) -> None:
    stock = make_model(family)
    tokens = some_tokens(9)
    expected = plain(stock, tokens)
    before = {name: weight.clone() for name, weight in stock.state_dict().items()}
    assert prepack_linears(stock, smallest=1) > 8
    assert any(isinstance(layer, PrepackedLinear) for layer in stock.modules())
    close(plain(stock, tokens), expected)
    close(LanguageModel(stock).forward(tokens).scores, expected)
    after = stock.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    close(plain(loaded, tokens), expected)


@pytest.mark.filterwarnings("ignore:the plain weight of a packed layer:UserWarning")
def test_tied_embeddings_survive_prepacking_and_saving(make_model: MakeModel, tmp_path: Path) -> None:
    stock = make_model("llama", tie_word_embeddings=True)
    expected = plain(stock, some_tokens(9))
    prepack_linears(stock, smallest=1)
    close(plain(stock, some_tokens(9)), expected)
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    close(plain(loaded, some_tokens(9)), expected)


def test_prepacking_is_chosen_by_size_and_can_be_turned_off(make_model: MakeModel) -> None:
    def packed(model: PreTrainedModel) -> int:
        return sum(isinstance(layer, PrepackedLinear) for layer in model.modules())

    large = {"hidden": 512, "layers": 1, "vocabulary": 2048, "intermediate_size": 1024}
    on, off = make_model("llama", **large), make_model("llama", **large)
    LanguageModel(on)
    LanguageModel(off, prepack=False)
    assert packed(on) > 0
    assert packed(off) == 0
    narrow = make_model("llama", hidden=256, layers=1, vocabulary=4096)
    LanguageModel(narrow)
    assert packed(narrow) == 0
    half = make_model("llama").half()
    with pytest.raises(ValueError, match=r"cannot be prepacked: that needs float32"):
        LanguageModel(half, prepack=True)


def _falcon_alibi() -> PreTrainedModel:
    config = FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    return FalconForCausalLM(config)


CHAINS_ALONE: dict[str, Callable[[], PreTrainedModel]] = {
    "BloomForCausalLM": lambda: BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)),
    "MptForCausalLM": lambda: MptForCausalLM(MptConfig(vocab_size=96, d_model=32, n_layers=1, n_heads=4)),
    "MambaForCausalLM": lambda: MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1)),
    "FalconForCausalLM": _falcon_alibi,
}


@pytest.mark.parametrize("kind", CHAINS_ALONE)
def test_a_model_that_verifies_chains_alone_says_why_and_what_can_use_it(kind: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(CHAINS_ALONE[kind]())
    assert not model.branches
    tokens = some_tokens(3)
    with pytest.raises(UnsupportedModelError, match=r"trees of candidates are read: .*: use SpeculativeDecoder"):
        model.forward(tokens, TokenTree((-1, -1, 1)))
    with pytest.raises(UnsupportedModelError, match=f"{kind} cannot be the target of LookaheadDecoder"):
        LookaheadDecoder(Pair(model))
    assert model.forward(tokens, TokenTree.chain(3)).scores.shape == (3, 96)


def test_nan_weights_are_refused(make_model: MakeModel) -> None:
    broken = make_model("llama")
    with torch.no_grad():
        broken.get_output_embeddings().weight[3, 4] = torch.nan
    with pytest.raises(NumericalError, match="gives NaN logits on a trial input"):
        LanguageModel(broken)


def test_the_context_limit_is_that_of_the_positions(make_model: MakeModel) -> None:
    assert LanguageModel(make_model("gpt2", context=77)).context_limit == 77
    assert LanguageModel(make_model("opt", context=77)).context_limit == 77
    windowed = LanguageModel(make_model("mistral", context=77, sliding_window=20), prepack=False)
    assert windowed.context_limit == 77
    tokens = some_tokens(77)
    scores = torch.cat([windowed.forward(part).scores for part in tokens.split((13, 9, 40, 15))])
    close(scores, plain(windowed.model, tokens))
    with pytest.raises(PromptError, match="has a context of 77 tokens; 77 are cached and 1 more"):
        windowed.forward(tokens[:1])


@pytest.mark.parametrize("parents", [(0,), (-1, 1), (-2,), (-1, 2, 0)])
def test_a_tree_whose_parents_come_late_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parents come before their children"):
        TokenTree(parents)


def test_a_long_text_is_read_in_parts_as_if_at_once(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specgym.decoding.models.language_model._PART", 7)
    model = make_model("llama")
    text = torch.randint(0, 96, (31,), generator=torch.Generator().manual_seed(2))
    reader = LanguageModel(model)
    reader.read(text[:-1].tolist())
    assert reader.length == 30
    expected = model(input_ids=text.unsqueeze(0)).logits[0, -1]
    torch.testing.assert_close(reader.forward(text[-1:]).scores[0], expected, atol=1e-4, rtol=1e-4)
