"""Names of pairs."""

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding.loading.find_model import shipped_models
from specgym.decoding.loading.presets import (
    DEFAULT,
    NGRAM,
    PRESETS,
    PROMPT_LOOKUP,
    SUFFIX,
    PairPreset,
    UnknownPairError,
    head_folder,
    resolve,
)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_to_itself(name: str) -> None:
    assert resolve(name) is PRESETS[name]
    assert PRESETS[name].name == name
    assert PRESETS[name].doc


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_model_of_a_preset_could_be_a_hub_id_or_is_shipped(preset: PairPreset) -> None:
    for model in (preset.target, *preset.drafts):
        if model not in (NGRAM, PROMPT_LOOKUP, SUFFIX):
            validate_repo_id(model)
            assert "/" in model or model in shipped_models() or head_folder(model)


def test_no_two_presets_are_the_same_pair() -> None:
    assert len({(preset.target, preset.draft) for preset in PRESETS.values()}) == len(PRESETS)


def test_the_default_needs_nothing_but_the_package() -> None:
    assert PRESETS[DEFAULT] == resolve("tiny")
    assert (resolve("tiny").target, resolve("tiny").draft) == ("tiny-10m", "tiny-10m-draft-1l")


def test_every_shipped_model_is_in_a_preset() -> None:
    used = {model for preset in PRESETS.values() for model in (preset.target, preset.draft)}
    assert set(shipped_models()) <= used


def test_a_preset_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["tiny"].target = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "target", "draft", "draft_is_model"),
    [
        ("gpt2-xl+gpt2", "gpt2-xl", "gpt2", True),
        ("facebook/opt-6.7b+facebook/opt-125m", "facebook/opt-6.7b", "facebook/opt-125m", True),
        ("tiny-3m+ngram", "tiny-3m", NGRAM, False),
        ("tiny-3m+facebook/opt-125m:int8", "tiny-3m", "facebook/opt-125m:int8", False),
        ("some.one/Model_1+prompt-lookup", "some.one/Model_1", PROMPT_LOOKUP, False),
        ("some.one/Model_1+suffix", "some.one/Model_1", SUFFIX, False),
        ("tiny-3m+gpt2:drafted-by-ngram", "tiny-3m", "gpt2:drafted-by-ngram", False),
        ("tiny-3m+gpt2:int8:drafted-by-suffix,ngram", "tiny-3m", "gpt2:int8:drafted-by-suffix,ngram", False),
    ],
)
def test_target_plus_draft_is_split_at_the_plus(name: str, target: str, draft: str, draft_is_model: bool) -> None:
    preset = resolve(name)
    assert (preset.name, preset.target, preset.draft) == (name, target, draft)
    assert preset.draft_is_model is draft_is_model


def test_folders_may_be_given_even_with_a_plus_in_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "my c++ model"
    folder.mkdir()
    preset = resolve(f"{folder}+tiny-3m")
    assert (preset.target, preset.draft) == (str(folder), "tiny-3m")
    assert resolve(f"tiny-3m+{folder}").draft == str(folder)


def test_a_misspelt_preset_gets_suggestions_and_the_list() -> None:
    with pytest.raises(UnknownPairError, match="Did you mean 'smollm2-ngram'") as caught:
        resolve("smolm2-ngram")
    for name in PRESETS:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "+",
        "~nobody",
        "~0",
        "a\0b",
        "tiny-20m",
        "tiny/code",
        "tiny-10m+",
        "+tiny-10m",
        "ngram+tiny-10m",
        "a b+c",
        "tiny-3m+gpt2:drafted-by-",
        "tiny-3m+gpt2:drafted-by-gpt2",
        "tiny-3m+ngram:drafted-by-suffix",
        "tiny-3m+gpt2:drafted-by-ngram:int8",
        "a/b/c+d",
    ],
)
def test_what_is_neither_preset_nor_pair_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(UnknownPairError, match=r"Give target\+draft"):
        resolve(name)


@given(st.text(max_size=30))
def test_any_text_is_either_resolved_to_itself_or_refused(name: str) -> None:
    try:
        preset = resolve(name)
    except UnknownPairError:
        return
    alone = preset.draft is None and preset.target == name
    assert name in PRESETS or alone or f"{preset.target}+{preset.draft}" == name


def test_a_folder_or_a_hub_id_is_a_target_without_a_draft(tmp_path: Path) -> None:
    for name in (str(tmp_path), "facebook/opt-125m"):
        preset = resolve(name)
        assert (preset.target, preset.draft, preset.draft_is_model) == (name, None, False)
