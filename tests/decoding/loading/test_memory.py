from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding import MemoryUse, NGramDrafter, Pair, memory_of
from specgym.decoding.drafts.copying import PromptLookupDrafter
from specgym.decoding.loading import memory
from specgym.decoding.models import linear_layers

USE = MemoryUse("toy", 42_200_000, 3_170_000, 26_600, 509_000_000, "process")


def size_of(model: PreTrainedModel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@pytest.fixture
def target(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama", layers=2, vocabulary=64, hidden=16)


def test_weights_of_target_and_draft_are_counted(
    target: PreTrainedModel, make_model: Callable[..., PreTrainedModel]
) -> None:
    draft = make_model("llama", layers=1, vocabulary=64, hidden=16, seed=1)
    use = memory_of(Pair(target, draft, name="toy"))
    assert (use.target, use.draft) == (size_of(target), size_of(draft))
    config = target.config
    of_a_layer = 2 * 4 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert use.per_token == 3 * of_a_layer


def test_what_a_draft_shares_is_counted_once(
    target: PreTrainedModel, make_model: Callable[..., PreTrainedModel]
) -> None:
    draft = make_model("llama", layers=1, vocabulary=64, hidden=16, seed=1)
    draft.set_input_embeddings(target.get_input_embeddings())
    embeddings = target.state_dict()["model.embed_tokens.weight"]
    assert memory_of(Pair(target, draft)).draft == size_of(draft) - embeddings.numel() * embeddings.element_size()
    assert memory_of(Pair(target, target)).draft == 0


def test_a_table_is_counted_and_a_draft_that_copies_is_none(target: PreTrainedModel) -> None:
    table = NGramDrafter.fit([[1, 2, 3, 1, 2]], 64)
    assert memory_of(Pair(target, table)).draft == table.nbytes > 0
    assert memory_of(Pair(target, PromptLookupDrafter(64))).draft == 0
    assert memory_of(Pair(target)).draft == 0


def test_prepacked_weights_are_counted(make_model: Callable[..., PreTrainedModel]) -> None:
    plain, packed = (make_model("llama", layers=1, vocabulary=16384, hidden=32) for _ in range(2))
    assert memory_of(Pair(packed, prepack=True)).target >= memory_of(Pair(plain, prepack=False)).target


def test_a_plain_weight_is_given_back_to_the_system_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else glibc keeps it: 24 layers of 576 x 1536 then took 1.19 times their size more, and 0.25 with this."""
    layers = [torch.nn.Linear(512, 1024, bias=False) for _ in range(3)]
    packed: list[int] = []
    monkeypatch.setattr(
        linear_layers, "_give_back", lambda: packed.append(sum(type(layer) is not torch.nn.Linear for layer in layers))
    )
    assert linear_layers.prepack_linears(torch.nn.Sequential(*layers)) == 3
    assert packed == [0, 1, 2]


def test_the_peak_holds_the_weights_and_decoding_leaves_the_pair_alone(target: PreTrainedModel) -> None:
    pair = Pair(target)
    use = memory_of(pair)
    assert use.peak_of == "process"
    assert use.peak is None or use.peak > use.target
    assert pair.target.length == 0


def test_a_system_that_says_nothing_has_no_peak(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_peak_resident", lambda: None)
    assert "peak" not in str(memory_of(Pair(target)))


def test_a_line_says_what_is_meant() -> None:
    assert str(USE) == (
        "toy: weights 42.2 MB (target) + 3.17 MB (draft), keys and values 26.6 kB a token; peak 509 MB resident in "
        "this process, Python included"
    )
    assert str(replace(USE, draft=0, peak_of="cuda:0", peak=2 * 10**9)).endswith("; peak 2 GB on cuda:0")
