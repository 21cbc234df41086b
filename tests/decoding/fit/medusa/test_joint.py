"""Joint training of a small target and its Medusa heads."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specgym.decoding.decoders.medusa.decoder import MedusaDecoder
from specgym.decoding.decoders.medusa.files import load_heads, save_heads
from specgym.decoding.decoders.medusa.heads import MedusaHeads, MedusaHeadsError
from specgym.decoding.errors import FitError, TrainingError
from specgym.decoding.fit.__main__ import main
from specgym.decoding.fit.measure import measure_domains
from specgym.decoding.fit.medusa import joint
from specgym.decoding.fit.medusa.joint import JointLoop, JointModel, JointSettings, make_joint
from specgym.decoding.fit.medusa.report import measure_speed
from specgym.decoding.fit.settings import TextSettings
from specgym.decoding.fit.text import target_text
from specgym.decoding.fit.text.prompts import cut_prompts
from specgym.decoding.loading.find_model import load_model
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models import language_model as models
from specgym.decoding.models.language_model import LanguageModel
from tests.helpers.counting import counting_model, words
from tests.helpers.small_medusa_heads import random_heads

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def settings(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> JointSettings:
    """A target that counts, and heads that guess what it says next, which is never the token after that."""
    model = counting_model(len(tokenizer))
    model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    save_heads(MedusaHeads.for_target(model, 2), tmp_path / "target-medusa", LanguageModel(model))
    (tmp_path / "notes.txt").write_text(words(9000))
    return JointSettings(
        target=str(tmp_path / "target"),
        out=tmp_path / "new",
        text=(tmp_path / "notes.txt",),
        heads_weight=1.0,
        own_text=TextSettings(texts=40, prompt_tokens=6, new_tokens=16, generate_batch=40, temperature=0.5),
        check_steps=10,
        tree_size=4,
        report_prompts=2,
        report_tokens=8,
        loop=JointLoop(
            tokens=40 * 8 * 22, batch=8, learning_rate=5e-3, optimiser="adamw", weight_decay=0.0, bfloat16=False,
            device="cpu", work=tmp_path / "work",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 4])
def test_heads_guess_better_after_it_and_both_are_written_together(
    settings: JointSettings, tmp_path: Path, rank: int
) -> None:
    report = make_joint(replace(settings, lora_rank=rank))
    assert report.before.accuracy.top(1).max() < 0.3
    assert report.after.accuracy.top(1).min() > 0.8
    assert report.after.whole.tokens_per_round > report.before.whole.tokens_per_round + 0.3
    new, _ = load_model(str(settings.out))
    old, _ = load_model(settings.target)
    names = {  # beyond what storing in float16 changes
        name
        for name, value in new.named_parameters()
        if not torch.allclose(value, old.get_parameter(name), rtol=2e-3, atol=1e-5)
    }
    assert names
    if rank:  # adapters leave everything alone but the layers' matrices, and are merged into those
        assert all(".layers." in name and name.endswith("proj.weight") for name in names)
    target = LanguageModel(new)
    heads = load_heads(tmp_path / "new-medusa", target)
    np.testing.assert_allclose(heads.accuracies, report.after.accuracy.shares, atol=1e-4)
    with pytest.raises(MedusaHeadsError):
        load_heads(tmp_path / "new-medusa", LanguageModel(load_model("tiny-3m")[0]))
    generation = MedusaDecoder(Pair(new), heads).generate([3, 4, 5], max_new_tokens=12)
    ids = torch.tensor([[3, 4, 5]])
    generating: Any = new
    greedy = generating.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert [*(3, 4, 5), *generation.tokens] == greedy[0].tolist()[: 3 + len(generation.tokens)]
    card = (settings.out / "README.md").read_text()
    assert (tmp_path / "new-medusa" / "README.md").read_text() == card
    assert "Medusa-2" in card
    assert "| perplexity, notes |" in card
    written = [path for folder in (settings.out, tmp_path / "new-medusa") for path in folder.iterdir()]
    assert not [path for path in written if str(tmp_path).encode() in path.read_bytes()]


@pytest.mark.parametrize("rank", [0, 4])
def test_a_killed_run_resumes_to_the_identical_result(
    settings: JointSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    settings = replace(settings, lora_rank=rank, loop=replace(settings.loop, tokens=25 * 8 * 22))
    files = [settings.out / "model.safetensors", tmp_path / "new-medusa" / "medusa.safetensors"]
    make_joint(settings)
    whole = [path.read_bytes() for path in files]
    assert whole[1] != (tmp_path / "target-medusa" / "medusa.safetensors").read_bytes()
    (settings.loop.work / "new.pt").unlink()
    calls = list[int]()
    forward = JointModel.forward

    def killed(self: JointModel, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    settings.loop.checkpoint_minutes = 0.0
    monkeypatch.setattr(JointModel, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        make_joint(settings)
    monkeypatch.undo()
    calls.clear()

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(JointModel, "forward", counted)
    make_joint(settings)
    assert 0 < len(calls) < 25
    assert [path.read_bytes() for path in files] == whole


def test_a_state_of_other_heads_is_refused(settings: JointSettings, tmp_path: Path) -> None:
    settings = replace(settings, loop=replace(settings.loop, tokens=8 * 22))
    make_joint(settings)
    target = LanguageModel(load_model(settings.target)[0])
    save_heads(random_heads(target.model, 2), tmp_path / "target-medusa", target)
    with pytest.raises(TrainingError, match=r"new\.pt belongs to a run with other settings or text"):
        make_joint(settings)


def test_both_speeds_are_those_of_targets_as_decoders_have_them(
    settings: JointSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepacked, measured, kept = list[Any](), list[Any](), list[Any]()
    monkeypatch.setattr(models, "NARROWEST_PREPACKED", 1)
    monkeypatch.setattr(models, "prepack_linears", lambda model, *_: prepacked.append(model))

    def measure(pair: Pair, *arguments: Any) -> Any:
        measured.append(pair.target.model)
        return measure_speed(pair, *arguments)

    def cut(*arguments: Any) -> Any:
        kept.append(cut_prompts(*arguments).held_out)
        return cut_prompts(*arguments)

    def quality(model: PreTrainedModel, held_out: Any) -> Any:
        np.testing.assert_equal(held_out, kept[0])
        return measure_domains(model, held_out)

    monkeypatch.setattr(joint, "measure_speed", measure)
    monkeypatch.setattr(target_text, "cut_prompts", cut)
    monkeypatch.setattr(joint, "measure_domains", quality)
    make_joint(replace(settings, loop=replace(settings.loop, tokens=8 * 22)))
    assert [id(model) for model in prepacked] == [id(model) for model in measured]
    assert measured[0] is not measured[1]


def test_adapters_can_be_trained_beside_a_target_in_bfloat16(settings: JointSettings) -> None:
    loop = replace(settings.loop, tokens=3 * 8 * 22)
    make_joint(replace(settings, lora_rank=2, dtype="bfloat16", loop=loop))
    state = torch.load(settings.loop.work / "new.pt", weights_only=True)
    assert {value.dtype for value in state["weights"].values()} == {torch.float32}
    assert "on a CPU, the target in bfloat16" in (settings.out / "README.md").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_rank": -1}, "--lora-rank must be a whole number of at least 0, got -1"),
        ({"dtype": "bfloat16"}, "must be float32: leave out --dtype, or give --lora-rank"),
        ({"heads_weight": 0.0}, "--heads-weight must be a finite number above 0, got 0.0"),
        ({"heads_rate": math.nan}, "--heads-rate must be a finite number above 0, got nan"),
        ({"loop": JointLoop(device="cpu")}, "AdamW without weight decay"),
    ],
)
def test_bad_settings_are_refused(settings: JointSettings, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        make_joint(replace(settings, **changed))
    assert not settings.out.exists()


def test_what_cannot_be_trained_is_refused_before_anything_is_generated(
    settings: JointSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_text, "continue_rows", lambda *_: pytest.fail("text was generated"))
    with pytest.raises(FitError, match=r"36 texts to train on .* batch of 64: give more --texts or a smaller --batch$"):
        make_joint(replace(settings, loop=replace(settings.loop, batch=64)))
    with pytest.raises(FitError, match=r"target would be written over .*target, which is read: give another --out"):
        make_joint(replace(settings, out=tmp_path / "other" / ".." / "target"))
    with pytest.raises(FitError, match=r"mine-medusa would be written over .*mine-medusa"):
        make_joint(replace(settings, out=tmp_path / "mine", heads_from=str(tmp_path / "mine-medusa")))
    with pytest.raises(FitError, match="a step takes whole texts"):
        make_joint(replace(settings, loop=replace(settings.loop, length=22)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FitError, match=r"pip install"):
        make_joint(replace(settings, lora_rank=2))
    target = LanguageModel(load_model(settings.target)[0])
    few = MedusaHeads.for_target(target.model, 2, vocabulary=(3, 5, 7))
    save_heads(few, tmp_path / "target-medusa", target)
    with pytest.raises(FitError, match=r"reduced vocabulary"):
        make_joint(settings)


def test_there_is_no_length_on_the_command_line(settings: JointSettings, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["medusa-joint", "--target", settings.target, "--out", str(settings.out), "--length", "22"])
    assert "--length" in capsys.readouterr().err


def test_a_target_without_heads_is_refused(settings: JointSettings, tmp_path: Path) -> None:
    (tmp_path / "target-medusa").rename(tmp_path / "elsewhere")
    with pytest.raises(MedusaHeadsError, match=r"fit medusa --target"):
        make_joint(settings)
    report = make_joint(
        replace(settings, heads_from=str(tmp_path / "elsewhere"), loop=replace(settings.loop, tokens=8 * 22))
    )
    assert report.after.accuracy.shares.shape[0] == 2


def test_the_command_line_trains_both(settings: JointSettings, tmp_path: Path) -> None:
    options = (
        "--texts 20 --prompt-tokens 4 --new-tokens 8 --report-prompts 1 --report-tokens 4 --tokens 24 --batch 2 "
        "--device cpu --lora-rank 2"
    )
    places = ["--out", str(settings.out), "--text", str(tmp_path / "notes.txt"), "--work", str(tmp_path / "work")]
    main(["medusa-joint", "--target", settings.target, *places, *options.split()])
    assert (tmp_path / "new-medusa" / "medusa.json").is_file()
