"""Training of Medusa heads on a target built to count in a circle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from specgym.decoding.decoders.medusa.files import load_heads
from specgym.decoding.errors import FitError, TrainingError, UnsupportedModelError
from specgym.decoding.fit.__main__ import main
from specgym.decoding.fit.medusa import heads
from specgym.decoding.fit.medusa.heads import MedusaSettings, make_medusa
from specgym.decoding.fit.settings import LoopSettings, TextSettings, dtype_of
from specgym.decoding.fit.text import target_text
from specgym.decoding.fit.text.states import hidden_states
from specgym.decoding.models.language_model import LanguageModel
from tests.helpers.counting import counting_model

SHIPPED = Path(heads.__file__).parents[2] / "data" / "models"


@pytest.fixture(scope="module")
def target(tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    return LanguageModel(counting_model(len(tokenizer)))


@pytest.fixture
def settings(tmp_path: Path, counting_folder: Path) -> MedusaSettings:
    return MedusaSettings(
        target=str(counting_folder / "target"),
        out=tmp_path / "target-medusa",
        text=(tmp_path / "notes.txt",),
        heads=3,
        own_text=TextSettings(texts=40, prompt_tokens=6, new_tokens=16, generate_batch=40),
        check_steps=20,
        patience=0,
        tree_size=8,
        report_prompts=2,
        report_tokens=30,
        loop=LoopSettings(
            tokens=60 * 32, batch=2, length=16, learning_rate=2e-2, optimiser="adamw", weight_decay=0.0,
            bfloat16=False, device="cpu", work=tmp_path / "work",
        ),
    )  # fmt: skip


def test_training_raises_accuracy_far_above_chance_and_decoding_gets_faster(
    settings: MedusaSettings, target: LanguageModel, tmp_path: Path
) -> None:
    before = make_medusa(
        replace(settings, out=tmp_path / "none", loop=replace(settings.loop, tokens=1, learning_rate=1e-9))
    )
    assert before.accuracy.top(1).max() < 0.3  # all heads predict the next token, which is never the one after it
    assert before.whole.tokens_per_round < 2
    report = make_medusa(settings)
    assert report.accuracy.top(1).min() > 0.9
    assert report.whole.tokens_per_round > before.whole.tokens_per_round + 0.8
    assert 2.5 < report.expected <= 4
    heads = load_heads(settings.out, target)
    np.testing.assert_allclose(heads.accuracies, report.accuracy.shares, atol=1e-4)


def test_the_card_says_what_was_done_and_no_path_of_this_machine(
    settings: MedusaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fit", "medusa", "--target", settings.target, f"--out={settings.out}"])
    make_medusa(settings)
    card = (settings.out / "README.md").read_text()
    assert "python -m specgym.decoding.fit medusa --target target --out=target-medusa" in card
    assert "target itself continued 40 prompts of 3 to 6 tokens" in card
    assert "notes.txt; licence not stated" in card
    assert "| notes, 3 |" in card
    assert "on a CPU, the target in float32" in card
    assert "Training kept the weights with the lowest loss on these texts" in card
    assert "still going on" not in card
    described = (settings.out / "medusa.json").read_text()
    assert json.loads(described)["target"] == "target"
    assert str(tmp_path) not in card + described


@pytest.mark.parametrize(
    "options", [{"vocabulary": 8}, {"vocabulary": 250}, {"own_output": True}, {"blocks": 2}, {"heads": 1}]
)
def test_heads_of_every_kind_are_trained(
    settings: MedusaSettings, target: LanguageModel, options: dict[str, Any]
) -> None:
    report = make_medusa(replace(settings, **options))
    assert report.accuracy.top(1).max() > (0.4 if "vocabulary" in options else 0.9)
    heads = load_heads(settings.out, target)
    outputs = heads.shape.outputs
    if "vocabulary" in options:
        assert outputs == min(options["vocabulary"], 12)  # the target writes no more
        assert f"They propose the {outputs} most frequent tokens" in (settings.out / "README.md").read_text()
    else:
        assert outputs == target.vocabulary_size
    assert heads.accuracies


def test_a_killed_run_resumes_to_the_identical_result_with_the_text_that_it_had(
    settings: MedusaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, loop=replace(settings.loop, checkpoint_minutes=0.0, tokens=30 * 32))
    make_medusa(replace(settings, out=tmp_path / "whole/heads"))
    parts = replace(settings, out=tmp_path / "parts/heads")
    parts.loop.work = tmp_path / "work"
    (settings.loop.work / "heads.pt").unlink()
    calls = list[int]()

    def killed(*arguments: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt

    monkeypatch.setattr(heads, "save_heads", killed)
    with pytest.raises(KeyboardInterrupt):
        make_medusa(parts)
    monkeypatch.undo()

    def refused(*_: Any) -> None:
        raise AssertionError("the text was there")

    monkeypatch.setattr(target_text, "continue_rows", refused)
    make_medusa(parts)
    whole, resumed = ((tmp_path / name / "heads/medusa.safetensors").read_bytes() for name in ("whole", "parts"))
    assert resumed == whole
    state = torch.load(settings.loop.work / "heads.pt", weights_only=True)
    assert state["outcome"]["steps"] == 30


def test_training_ends_early_with_the_weights_of_the_lowest_loss(settings: MedusaSettings) -> None:
    wild = replace(settings, check_steps=2, patience=3, loop=replace(settings.loop, learning_rate=3.0, warmup=0.0))
    report = make_medusa(wild)
    state = torch.load(settings.loop.work / "target-medusa.pt", weights_only=True)
    assert state["outcome"]["steps"] < 60
    assert state["stopping"]["best"] == report.loss.lowest
    for name, value in state["stopping"]["weights"].items():
        assert torch.equal(value, state["weights"][name])


@pytest.mark.parametrize(
    ("changed", "own_text", "message"),
    [
        ({"heads": 0}, {}, "--heads must be a whole number of at least 1, got 0"),
        ({"vocabulary": 301}, {}, r"--vocabulary 301 is more than the target's \d+ tokens"),
        ({"text": (Path("nowhere.txt"),)}, {}, "no text in nowhere.txt"),
        ({}, {"new_tokens": 60}, "--prompt-tokens 6 and --new-tokens 60 are together more than .* 64"),
        ({}, {"new_tokens": 3}, "--new-tokens must be a whole number of at least 4, got 3"),
        ({}, {"temperature": -1.0}, "--temperature must be a finite number of at least 0, got -1.0"),
        ({}, {"texts": 3}, "--texts 3 is too few"),
        ({"loop": LoopSettings(device="cpu")}, {}, "AdamW without weight decay"),
        ({}, {"texts": 8}, "96 tokens of the target's own text are too few for a batch of 100: give more --texts"),
    ],
)
def test_bad_input_is_refused_before_anything_is_generated(
    settings: MedusaSettings,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    own_text: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(target_text, "continue_rows", lambda *_: pytest.fail("text was generated"))
    settings.loop.batch = 10
    settings.loop.length = 10
    with pytest.raises((FitError, FileNotFoundError), match=message):
        make_medusa(replace(settings, **changed, own_text=replace(settings.own_text, **own_text)))
    assert not settings.out.exists()


def test_a_target_without_an_output_layer_is_refused(settings: MedusaSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no output layer"):
        make_medusa(settings)


@pytest.mark.parametrize("changed", [{"patience": 5}, {"heads": 2}, {"own_text": TextSettings(24, 6, 16, 0.0, 16)}])
def test_a_state_of_other_settings_is_refused(settings: MedusaSettings, changed: dict[str, Any]) -> None:
    short = replace(settings, loop=replace(settings.loop, tokens=32))
    make_medusa(short)
    with pytest.raises(TrainingError, match=r"target-medusa\.pt belongs to a run with other settings or text"):
        make_medusa(replace(short, **changed))


def test_texts_that_end_too_early_for_a_batch_are_refused(
    settings: MedusaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        target_text, "continue_rows", lambda _, rows, *__: [[*row, *(1,) * (len(row) % 4)] for row in rows]
    )
    with pytest.raises(FitError, match="too few for a batch of 400: give more --texts"):
        make_medusa(replace(settings, loop=replace(settings.loop, batch=4, length=100)))


def test_the_targets_own_folder_is_not_written_over(settings: MedusaSettings, tmp_path: Path) -> None:
    before = sorted(path.name for path in (tmp_path / "target").iterdir())
    with pytest.raises(FitError, match=r"target would be written over .*target, which is read: give another --out"):
        make_medusa(replace(settings, out=tmp_path / "work" / ".." / "target"))
    with pytest.raises(FitError, match="would be written over tiny-3m"):
        make_medusa(replace(settings, target="tiny-3m", out=SHIPPED / "tiny-3m"))
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == before


def test_what_improves_nothing_is_said_to(settings: MedusaSettings, capsys: pytest.CaptureFixture[str]) -> None:
    loop = replace(settings.loop, tokens=2 * 32, learning_rate=10.0, warmup=0.0)
    report = make_medusa(replace(settings, loop=loop))
    assert report.loss.lowest == report.loss.before
    assert "Training improved nothing" in capsys.readouterr().out
    assert "- Training improved nothing" in (settings.out / "README.md").read_text()


def test_a_target_may_be_of_another_type_than_its_heads(
    settings: MedusaSettings, target: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = set[torch.dtype]()

    def states(model: PreTrainedModel, *arguments: Any) -> Any:
        types.add(model.dtype)
        return hidden_states(model, *arguments)

    monkeypatch.setattr(heads, "hidden_states", states)
    report = make_medusa(replace(settings, dtype="bfloat16"))
    assert types == {torch.bfloat16}
    assert report.accuracy.top(1).min() > 0.9
    state = torch.load(settings.loop.work / "target-medusa.pt", weights_only=True)
    assert {value.dtype for value in state["weights"].values()} == {torch.float32}
    card = (settings.out / "README.md").read_text()
    assert "on a CPU, the target in bfloat16" in card
    load_heads(settings.out, target)  # which is in float32


def test_a_target_that_stays_as_it_is_has_the_type_that_decoders_give_it(
    settings: MedusaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoopSettings, "torch_device", lambda self: torch.device(self.device))  # here or not
    cpu, cuda = LoopSettings(device="cpu"), LoopSettings(device="cuda:1")
    assert dtype_of(replace(settings, loop=cpu), frozen=True) == torch.float32
    assert dtype_of(replace(settings, loop=cuda), frozen=True) == torch.bfloat16
    assert dtype_of(replace(settings, loop=cuda), frozen=False) == torch.float32
    assert dtype_of(replace(settings, dtype="float32", loop=cuda), frozen=True) == torch.float32


def test_the_command_line_makes_heads(settings: MedusaSettings, target: LanguageModel, tmp_path: Path) -> None:
    options = (
        "--heads 2 --texts 20 --prompt-tokens 4 --new-tokens 8 --temperature 0.5 --report-prompts 1 --report-tokens 4 "
        "--tokens 16 --batch 1 --length 8 --device cpu"
    )
    places = ["--out", str(settings.out), "--text", str(tmp_path / "notes.txt"), "--work", str(tmp_path / "work")]
    main(["medusa", "--target", settings.target, *places, *options.split()])
    assert load_heads(settings.out, target).shape.heads == 2
