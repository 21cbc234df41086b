"""Pairs with a model in common hold it once, decode independently, and free it with the last of them."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specgym.decoding import AutoregressiveDecoder, ModelDrafter, Pair, load_pair
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.loading import find_model, pair
from specgym.decoding.loading.checkpoint import save_checkpoint
from specgym.decoding.models.linear_layers import PrepackedLinear, only_looking


def _save(folder: Path, layers: int, *, vocabulary: int = 64, seed: int = 0, shared_with: str | None = None) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    shared = ["model.embed_tokens.weight"] if shared_with else []
    model = LlamaForCausalLM(config)
    save_checkpoint(model, folder, card="", shared_with=shared_with, shared=shared, dtype=torch.float32)
    words = {f"w{number}": number for number in range(vocabulary)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(folder)


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs ``target+one``, ``target+two`` and ``target+prompt-lookup`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    _save(Path("target"), 2)
    _save(Path("one"), 1, shared_with="../target")
    _save(Path("two"), 1, seed=1)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are read from the disk."""
    names: list[str] = []

    def counted(name: str, **options: object) -> object:
        names.append(name)
        return find_model.load_model(name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pair, "load_model", counted)
    return names


def draft_of(pair: Pair) -> torch.nn.Module:
    assert isinstance(pair.draft, ModelDrafter)
    return pair.draft.model.model


def storages(model: torch.nn.Module) -> set[int]:
    with only_looking():
        return {parameter.data_ptr() for parameter in model.parameters()}


def test_pairs_of_one_target_share_its_weights(loads: list[str]) -> None:
    first_pair, second_pair, lookup = (
        load_pair(f"target+{draft}", device="cpu") for draft in ("one", "two", "prompt-lookup")
    )
    assert storages(first_pair.target.model) == storages(second_pair.target.model) == storages(lookup.target.model)
    assert first_pair.tokenizer is second_pair.tokenizer
    assert loads == ["target", "one", "two"]
    assert storages(draft_of(first_pair)) & storages(first_pair.target.model)  # the embeddings
    again = load_pair("target+one", device="cpu")
    assert storages(draft_of(again)) == storages(draft_of(first_pair))
    assert loads == ["target", "one", "two"]


def test_prepacked_modules_are_shared_and_lend_plain_weights() -> None:
    for name, shared_with in (("target", None), ("one", "../target")):
        _save(Path(name), 1, vocabulary=8192, shared_with=shared_with)
    packed = load_pair("target+prompt-lookup", device="cpu", prepack=True)
    (layer,) = (module for module in packed.target.model.modules() if isinstance(module, PrepackedLinear))
    later = load_pair("target+one", device="cpu", prepack=True)
    assert layer in set(later.target.model.modules())
    assert storages(draft_of(later)) & storages(later.target.model)
    plain = load_pair("target+one", device="cpu", prepack=False)
    assert not storages(plain.target.model) & storages(packed.target.model)


def test_texts_of_pairs_that_share_a_target_are_independent() -> None:
    first_pair, second_pair = (load_pair(f"target+{draft}", device="cpu") for draft in ("one", "two"))
    texts = []
    for name, prompt in (("one", [1, 2, 3]), ("two", [4, 5])):
        alone = AutoregressiveDecoder(load_pair(f"target+{name}", device="cpu", shared=False))
        texts.append(list(alone.generate(prompt, max_new_tokens=24).tokens))
    first = SpeculativeDecoder(first_pair).start([1, 2, 3], max_new_tokens=24)
    second = SpeculativeDecoder(second_pair).start([4, 5], max_new_tokens=24)
    while not (first.finished and second.finished):
        for session in (first, second):
            if not session.finished:
                session.step()
    assert [list(first.tokens), list(second.tokens)] == texts
    assert first_pair.target.length == second_pair.target.length == 0


def test_other_types_and_models_of_ones_own_are_apart() -> None:
    shared = load_pair("target+one", device="cpu")
    half = load_pair("target+one", device="cpu", dtype=torch.bfloat16)
    mine = load_pair("target+one", device="cpu", shared=False)
    assert half.target.dtype == torch.bfloat16
    assert not storages(half.target.model) & storages(shared.target.model)
    assert not storages(mine.target.model) & storages(shared.target.model)


def test_a_folder_that_was_written_anew_is_read_again() -> None:
    before = load_pair("target+prompt-lookup", device="cpu")
    _save(Path("target"), 3)
    after = load_pair("target+prompt-lookup", device="cpu")
    assert len(list(after.target.model.modules())) > len(list(before.target.model.modules()))


def test_a_model_that_no_pair_uses_is_freed(loads: list[str]) -> None:
    first_pair, second_pair = (load_pair(f"target+{draft}", device="cpu") for draft in ("one", "two"))
    target, draft = weakref.ref(first_pair.target.model), weakref.ref(draft_of(first_pair))
    del first_pair
    gc.collect()
    assert draft() is None
    assert target() is not None
    del second_pair
    gc.collect()
    assert target() is None
    load_pair("target+one", device="cpu")
    assert loads == ["target", "one", "two", "target", "one"]


def test_the_pairs_that_ship_share_their_target() -> None:
    pairs = [load_pair(name, device="cpu", offline=True) for name in ("tiny", "tiny-10m-2l")]
    first, second = (storages(item.target.model) for item in pairs)
    assert first == second


def test_a_weight_that_a_draft_shares_with_its_target_starts_no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    _save(Path("large"), 2, vocabulary=512)
    _save(Path("draft"), 1, vocabulary=512, shared_with="../large")
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("what takes longer than loading a small pair"))
    load_pair("large+draft", prepack=True)
