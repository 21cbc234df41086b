import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from specgym.decoding.errors import PromptError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.loading.presets import models_placed
from specgym.decoding.loading.prompt_tokens import prompts_limited
from specgym.decoding.prompts import PromptSet
from specgym.decoding.sampling import Sampling
from specgym.envs import SHIPPED_WORKLOADS, TokenPrompts, Workload, workload
from specgym.envs import workloads as module
from specgym.envs.workloads import WorkloadError

TEXTS = PromptSet("words", train=("seek find", "knock"), test=("find",), source="here", licence="MIT")


def test_a_name_is_pair_slash_prompts_and_means_greedy() -> None:
    result = workload("tiny/prose")
    assert (result.pair, result.prompts, result.sampling.greedy, str(result)) == ("tiny", "prose", True, "tiny/prose")


def test_a_temperature_follows_an_at_sign() -> None:
    result = workload("tiny/code@0.7")
    assert result.sampling == Sampling(temperature=0.7)
    assert result.name == "tiny/code@0.7"


def test_an_at_sign_in_a_path_is_no_temperature(tmp_path: Path) -> None:
    folder = tmp_path / "me@host" / "target@2"
    folder.mkdir(parents=True)
    file = tmp_path / "mine@0.5.txt"
    file.write_text("one\ntwo")
    (tmp_path / "a@1.0").mkdir()
    (tmp_path / "a@1.0" / "b.txt").write_text("one\ntwo")
    for pair, prompts in ((str(folder), "prose"), ("tiny", str(file)), (str(folder), f"{tmp_path}/a@1.0/b.txt")):
        result = workload(f"{pair}/{prompts}")
        assert (result.pair, result.prompts, result.sampling) == (pair, prompts, Sampling(0.0))
        assert workload(result.name) == result
        warm = workload(f"{pair}/{prompts}@0.7")
        assert (warm.pair, warm.prompts, warm.sampling) == (pair, prompts, Sampling(0.7))
        assert workload(warm.name) == warm


def test_hub_ids_keep_their_slashes() -> None:
    result = workload("some-lab/large+some-lab/small/lambada")
    assert (result.pair, result.prompts) == ("some-lab/large+some-lab/small", "lambada")


def test_prompts_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(["one", "two"]))
    result = workload(f"tiny/{file}")
    assert (result.pair, result.prompts) == ("tiny", str(file))


@pytest.mark.parametrize("name", SHIPPED_WORKLOADS)
def test_every_default_workload_has_a_known_pair_and_prompts(name: str) -> None:
    assert workload(name).name == name


def test_a_workload_is_passed_through(toy_workload: Workload) -> None:
    assert workload(toy_workload) is toy_workload


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/prosa", "no prompts 'prosa'. Did you mean 'prose'"),
        ("tinny/prose", "no pair 'tinny'. Did you mean 'tiny'"),
        ("prose", "not of the form pair/prompts"),
        ("tiny/prose@warm", "'warm' after @ is no temperature"),
        ("tiny/prose@-1", "'-1' after @ is no temperature"),
        ("tiny/prosa@1.0", "no prompts 'prosa'. Did you mean 'prose'"),
        ("me@host/prose", "no pair 'me@host'"),
        ("", "not of the form"),
        ("tiny//no/such/folder/mine.txt", "no prompts '/no/such/folder/mine.txt'"),
        ("tiny/folder/mine.txt", "no prompts 'folder/mine.txt'"),
    ],
)
def test_an_unknown_name_is_refused_with_what_there_is(name: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=re.escape(message)) as caught:
        workload(name)
    if "@" not in name:
        assert "tiny-10m-ngram" in str(caught.value)
        assert "definitions" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "dev"}, "'train' or 'test', got 'dev'"), ({"max_prompt_tokens": 1}, "at least 2, got 1")],
)
def test_senseless_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        Workload("tiny", "prose", **arguments)


@pytest.mark.parametrize(("train", "test"), [([], [[1]]), ([[1]], [[]])])
def test_empty_token_prompts_are_refused(train: list[list[int]], test: list[list[int]]) -> None:
    with pytest.raises(WorkloadError, match="prompts of at least one token"):
        TokenPrompts(train, test)


def test_texts_are_encoded_by_the_pairs_tokenizer(speaking_pair: Pair) -> None:
    result = Workload(speaking_pair, TEXTS)
    assert result.prompt_ids() == ((2, 3), (1,))
    assert result.with_split("test").prompt_ids() == ((3,),)
    assert result.prompt_ids() is result.prompt_ids()


def test_texts_without_a_tokenizer_are_refused(pair: Pair) -> None:
    with pytest.raises(PromptError, match="pair toy has no tokenizer, and prompt set 'words' is text"):
        Workload(pair, TEXTS).prompt_ids()


def test_prompts_are_whole_unless_asked_or_where_the_context_ends(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    room = pair.target.context_limit // 2
    rows = [[5] * room, list(range(60)) * 3, [7] * 9]
    result = Workload(pair, TokenPrompts(rows, [[1]]), name="long")
    assert [len(ids) for ids in result.prompt_ids()] == [room, room, 9]
    assert result.prompt_ids()[1] == tuple(rows[1][-room:])
    assert result.encoded("train") == tuple(map(tuple, rows))
    assert [record.getMessage() for record in caplog.records] == [
        f"long: 1 of 3 train prompts, of up to 180 tokens, are cut to {room}, so that {room} of LlamaForCausalLM's "
        f"context of {2 * room} are left for the text"
    ]


def test_a_length_asked_for_cuts_the_beginning_and_says_so_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    result = Workload(pair, TokenPrompts([list(range(2, 60)), [4]], [[1]]), name="asked", max_prompt_tokens=3)
    assert result.prompt_ids() == result.prompt_ids() == ((57, 58, 59), (4,))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == "asked: 1 of 2 train prompts, of up to 58 tokens, are cut to 3, the max_prompt_tokens asked for"


def test_a_command_asks_for_all_workloads_that_name_no_length(pair: Pair) -> None:
    prompts = TokenPrompts([list(range(2, 60))], [[1]])
    with prompts_limited(4):
        assert len(Workload(pair, prompts).prompt_ids()[0]) == 4
        assert len(Workload(pair, prompts, max_prompt_tokens=5).prompt_ids()[0]) == 5
    assert len(Workload(pair, prompts).prompt_ids()[0]) == 58


def test_ids_that_begin_a_text_keep_their_bos_token(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.target.model.config, "bos_token_id", 9)
    result = Workload(pair, TokenPrompts([[9, *range(10, 40)], [*range(10, 40)]], [[1]]), max_prompt_tokens=3)
    assert result.prompt_ids() == ((9, 38, 39), (37, 38, 39))


def test_prompts_leave_room_in_the_shorter_context_of_two(make_model: Any, pair: Pair) -> None:
    draft = make_model("llama", layers=1, vocabulary=pair.target.vocabulary_size, hidden=16, context=32)
    both = Pair(pair.target, draft, name="short draft")
    assert len(Workload(both, TokenPrompts([[5] * 60], [[1]])).prompt_ids()[0]) == 16


def test_a_pair_is_loaded_once_a_process(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> Pair:
        loaded.append(name)
        return pair

    monkeypatch.setattr("specgym.decoding.load_pair", load)
    module._shared_pair.cache_clear()
    assert Workload("tiny", "prose").load() is Workload("tiny", "code").load()
    assert loaded == ["tiny"]
    with models_placed("bfloat16", "cpu"):
        Workload("tiny", "prose").load()
    assert loaded == ["tiny", "tiny"]
    module._shared_pair.cache_clear()


def test_copies_share_the_models(toy_workload: Workload) -> None:
    assert copy.deepcopy({"workload": toy_workload})["workload"] is toy_workload


def test_sampling_is_part_of_the_name(pair: Pair) -> None:
    prompts = TokenPrompts([[1]], [[2]], name="p")
    assert Workload(pair, prompts, Sampling(0.5, top_k=4, top_p=0.9)).name == "toy/p@0.5,top_k=4,top_p=0.9"
