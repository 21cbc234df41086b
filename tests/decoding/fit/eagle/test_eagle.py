"""Training of EAGLE heads on a target built to count in a circle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specgym.decoding import EagleHead, LanguageModel, load_head
from specgym.decoding.errors import FitError, TrainingError
from specgym.decoding.fit.__main__ import main
from specgym.decoding.fit.eagle import heads
from specgym.decoding.fit.eagle.features import features_of
from specgym.decoding.fit.eagle.heads import EagleSettings, make_eagle
from specgym.decoding.fit.eagle.report import EagleReportSettings
from specgym.decoding.fit.eagle.unroll import unrolled_loss
from specgym.decoding.fit.settings import LoopSettings, TextSettings
from specgym.decoding.fit.text import target_text
from specgym.decoding.fit.text.chats import ChatTextSettings, turn_of_user, write_prompts
from specgym.decoding.fit.text.prompts import JUDGING, SPEED, TRAINING
from specgym.decoding.fit.text.target_text import TargetText
from tests.helpers.counting import CIRCLE, counting_model

MakeModel = Callable[..., PreTrainedModel]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}> {% endif %}"


@pytest.fixture
def settings(tmp_path: Path, counting_folder: Path) -> EagleSettings:
    return EagleSettings(
        target=str(counting_folder / "target"),
        out=tmp_path / "target-eagle",
        text=(tmp_path / "notes.txt",),
        own_text=TextSettings(texts=40, prompt_tokens=6, new_tokens=16, generate_batch=40),
        check_steps=20,
        patience=0,
        report=EagleReportSettings(report_prompts=0),
        loop=LoopSettings(
            tokens=60 * 88, batch=4, learning_rate=1e-2, bfloat16=False, device="cpu", work=tmp_path / "work"
        ),
    )


def test_training_raises_agreement_far_above_chance(
    settings: EagleSettings, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    none = replace(settings, out=tmp_path / "none", loop=replace(settings.loop, tokens=1, learning_rate=1e-9))
    before = make_eagle(none).quality["notes"]
    assert before.greedy_match.max() < 0.5
    report = make_eagle(replace(settings, vocabulary=40, store="int8"))
    after = report.quality["notes"]
    assert after.greedy_match.min() > 0.95
    assert after.alpha.min() > before.alpha.max()
    assert 0 < after.covered < 1
    assert report.loss.lowest < report.loss.before
    head = load_head(settings.out, LanguageModel(counting_model(len(tokenizer))))
    assert head.shape.outputs == 40
    assert set(CIRCLE) < set(head.shape.vocabulary)


def test_the_card_says_what_was_done_and_no_path_of_this_machine(
    settings: EagleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fit", "eagle", "--target", settings.target, f"--out={settings.out}"])
    short = replace(settings, loop=replace(settings.loop, tokens=200), vocabulary=30)
    make_eagle(replace(short, report=EagleReportSettings(report_prompts=1, report_tokens=4, compared_with=("suffix",))))
    card = (settings.out / "README.md").read_text()
    assert "python -m specgym.decoding.fit eagle --target target --out=target-eagle" in card
    assert "target itself continued 40 prompts of 3 to 6 tokens" in card
    assert "It proposes the 30 most frequent tokens alone" in card
    assert "unrolled along 3 tokens of its own draft" in card
    for row in ("| notes | ", "| chat, target-eagle |", "| all, suffix |"):
        assert row in card
    assert "still going on" not in card
    assert str(tmp_path) not in card + (settings.out / "eagle.json").read_text()


def test_a_killed_run_resumes_to_the_identical_result_with_the_text_that_it_had(
    settings: EagleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, loop=replace(settings.loop, checkpoint_minutes=0.0, tokens=12 * 88))
    make_eagle(replace(settings, out=tmp_path / "whole/head"))
    (settings.loop.work / "head.pt").unlink()
    parts, calls = replace(settings, out=tmp_path / "parts/head"), list[int]()

    def killed(*arguments: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(heads, "save_head", killed)
    with pytest.raises(KeyboardInterrupt):
        make_eagle(parts)
    monkeypatch.undo()
    monkeypatch.setattr(target_text, "continue_rows", lambda *_: pytest.fail("the text was there"))
    make_eagle(parts)
    whole, resumed = ((tmp_path / name / "head/eagle.safetensors").read_bytes() for name in ("whole", "parts"))
    assert resumed == whole
    for changed in ({"unroll": 2}, {"layers": (0,), "patience": 3}, {"vocabulary": 20}):
        with pytest.raises(TrainingError, match=r"head\.pt belongs to a run with other settings or text"):
            make_eagle(replace(parts, **changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unroll": 0}, "--unroll must be a whole number of at least 1, got 0"),
        ({"vocabulary": 301}, r"--vocabulary must be a whole number .*0 takes all"),
        ({"text": (Path("nowhere.txt"),)}, "no text in nowhere.txt"),
        ({"loop": LoopSettings(device="cpu", length=7)}, "leave out --length"),
        ({"chats": ChatTextSettings(own_prompts=10)}, "has no chat template"),
        ({"chats": ChatTextSettings(continuations=0)}, "--continuations must be"),
        ({"layers": (1,)}, "layer 1 is asked for"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    settings: EagleSettings, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises((FitError, FileNotFoundError, ValueError), match=message):
        make_eagle(replace(settings, **changed))
    assert not settings.out.exists()


def test_the_command_line_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eagle", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for option in ("--own-prompts", "--unroll", "--compared-with", "--store", "--prompt-sets"):
        assert option in words


def test_the_loss_counts_what_the_target_wrote_and_nothing_else(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", layers=3, spread=0.15)
    head = EagleHead.for_target(model)
    rng = np.random.default_rng(0)
    text = TargetText(
        tokens=rng.integers(1, 96, (3, 14)).astype(np.int32),
        prompts=np.array([4, 1, 7]),
        ends=np.array([14, 9, 12]),
        domain=np.zeros(3, dtype=np.int64),
        side=np.zeros(3, dtype=np.int64),
        domains=("words",),
        digest="words",
        folder=tmp_path,
    )
    features = features_of(model, head, text, bfloat16=False)
    rows = np.arange(3)
    batch = features.of(rows, torch.device("cpu"))
    assert batch.counted(0).sum(1).tolist() == [10, 7, 5]  # the first token of a text is guessed by no head
    assert batch.counted(2).sum(1).tolist() == [8, 5, 3]
    with torch.inference_mode():
        whole = unrolled_loss(head, head.output, batch, 3)
        alone = [
            unrolled_loss(head, head.output, features.of(rows[row : row + 1], torch.device("cpu")), 1) for row in rows
        ]
        together = unrolled_loss(head, head.output, batch, 1)
        # Padding, and what the head would say of prompts, is nothing to the loss.
        batch.tokens[1, 9:], batch.states[1, 9:], batch.last[2, :6] = 7, 0, 0
        assert unrolled_loss(head, head.output, batch, 3) == whole
        batch.last[0, 4] = 0
        assert unrolled_loss(head, head.output, batch, 3) != whole
    mean = (10 * alone[0] + 7 * alone[1] + 5 * alone[2]) / 22
    torch.testing.assert_close(together, mean, rtol=1e-4, atol=1e-4)


def test_a_chat_model_writes_messages_that_differ_and_end(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("<|end|>", str(tokenizer.eos_token)))
    prefix, ending = turn_of_user(tokenizer)
    assert (tokenizer.decode(prefix), ending) == ("<s>", tokenizer.eos_token_id)
    model: Any = make_model("llama", vocabulary=len(tokenizer), spread=0.05, context=64)
    letters = torch.full((len(tokenizer),), -20.0)
    letters[[ending, *(tokenizer.get_vocab()[letter] for letter in "abcdefgh")]] = 0.0
    model.lm_head.bias = nn.Parameter(letters)
    how = TextSettings(texts=4, prompt_tokens=8, new_tokens=24, generate_batch=128)
    prompts = write_prompts(model, tokenizer, {ending}, 128, how, 0, tmp_path, "it")
    texts = [str(tokenizer.decode(row)) for row in prompts.rows]
    assert 8 <= len(texts) < 128  # some have no end by then, some are there twice
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text.startswith("<s>")
        assert text.endswith(f"{tokenizer.eos_token}> ")
        assert text.removeprefix("<s>").removesuffix(f"{tokenizer.eos_token}> ").strip()
    assert {TRAINING, JUDGING, SPEED} == set(prompts.side.tolist())
    assert f"{len(texts)} differ from all others" in prompts.sources[0]
    again = write_prompts(model, tokenizer, {ending}, 128, how, 0, tmp_path, "it")
    assert again.rows == prompts.rows
    with pytest.raises(FitError, match="give more --own-prompts"):
        write_prompts(counting_model(len(tokenizer)), tokenizer, {ending}, 16, how, 0, tmp_path, "it")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("<|end|>", " word"))
    with pytest.raises(FitError, match="special token ends a user's message"):
        turn_of_user(tokenizer)
