import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from specgym.decoding.errors import PromptError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.loading.presets import models_placed
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
        ("", "not of the form"),
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


def test_long_prompts_lose_their_beginning(pair: Pair) -> None:
    result = Workload(pair, TokenPrompts([list(range(60)) * 3], [[1]]), max_prompt_tokens=3)
    assert result.prompt_ids() == ((57, 58, 59),)


def test_prompts_fill_at_most_half_the_context(pair: Pair) -> None:
    result = Workload(pair, TokenPrompts([list(range(60)) * 3], [[1]]))
    assert len(result.prompt_ids()[0]) == pair.target.context_limit // 2


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
