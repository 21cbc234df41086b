"""Drafts that learn from what their target writes itself, and that propose some tokens only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.errors import FitError
from specgym.decoding.fit.draft import distil
from specgym.decoding.fit.draft.distil import DraftSettings, make_draft
from specgym.decoding.fit.draft.init_from_target import take_layers
from specgym.decoding.fit.draft.objectives import measure_texts, text_loss
from specgym.decoding.fit.draft.report import DecodingReport, ReportSettings, measure_decoding
from specgym.decoding.fit.measure import measure
from specgym.decoding.fit.medusa.heads import MedusaSettings, make_medusa
from specgym.decoding.fit.settings import LoopSettings, TextSettings
from specgym.decoding.fit.text import target_text
from specgym.decoding.fit.text.prompts import JUDGING, SPEED, TRAINING
from specgym.decoding.fit.text.states import hidden_states
from specgym.decoding.fit.text.target_text import TargetText
from specgym.decoding.loading.checkpoint import load_checkpoint, read_link
from specgym.decoding.loading.find_model import load_model
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.output_layer import ReducedOutput, output_layer, reduce_output, reduced_output
from tests.helpers.counting import CIRCLE, counting_model

FAMILIES = ("llama", "gpt2", "opt", "gpt_neox")
MakeModel = Callable[..., PreTrainedModel]
TOKENS = torch.arange(0, 96, 2)


@pytest.fixture
def settings(tmp_path: Path, counting_folder: Path) -> DraftSettings:
    return DraftSettings(
        target=str(counting_folder / "target"),
        out=tmp_path / "draft",
        text=(tmp_path / "notes.txt",),
        own_text=True,
        writing=TextSettings(texts=40, prompt_tokens=6, new_tokens=16, generate_batch=40),
        hidden=32,
        loop=LoopSettings(
            tokens=60 * 4 * 22, batch=4, learning_rate=2e-2, bfloat16=False, device="cpu", work=tmp_path / "work"
        ),
    )


def a_text(folder: Path, rows: int = 6) -> TargetText:
    """Random texts of unequal lengths, some kept apart."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, 6, rows)
    ends = prompts + rng.integers(2, 9, rows)
    tokens = rng.integers(0, 96, (rows, int(ends.max()) + 2)).astype(np.int32)
    side = np.array([TRAINING, JUDGING, SPEED] * (rows // 3))
    return TargetText(tokens, prompts, ends, np.arange(rows) % 2, side, ("one", "two"), "0" * 64, folder)


def untrained(settings: DraftSettings) -> DraftSettings:
    return replace(
        settings,
        out=settings.out.with_name("none"),
        loop=replace(settings.loop, tokens=1, learning_rate=1e-9),
    )


@pytest.mark.parametrize("options", [{}, {"vocabulary": 15}, {"own_text": False, "vocabulary": 10}])
def test_a_draft_learns_what_its_target_says(settings: DraftSettings, options: dict[str, Any]) -> None:
    settings = replace(settings, **options)
    if not settings.own_text:
        settings.loop.length = 22
    before, after = make_draft(untrained(settings))["notes"], make_draft(settings)["notes"]
    assert after.kl < before.kl / 2
    if settings.own_text:  # plain text is not what this target ever says, so that there is nothing to be accepted
        assert after.alpha > before.alpha + 0.2
    layer = reduced_output(load_checkpoint(settings.out))
    assert (layer is None) is ("vocabulary" not in options)
    if layer is not None:
        assert len(layer.tokens) == options["vocabulary"]  # more than are ever written where 15 are asked for
        assert after.alpha <= after.covered + 1e-5
    if settings.own_text and layer is not None:
        assert layer.tokens.tolist() == [0, 1, 2, *CIRCLE]  # the circle is all that the target writes
        assert after.covered > 0.9


def test_layers_of_the_target_are_all_that_is_stored(settings: DraftSettings, tmp_path: Path) -> None:
    qualities = make_draft(replace(settings, hidden=None, vocabulary=12))
    assert qualities["notes"].greedy_match > 0.9  # a target whose layers do nothing
    stored = load_file(settings.out / "model.safetensors")
    assert stored["lm_head.tokens"].tolist() == list(CIRCLE)
    assert "lm_head.weight" not in stored
    assert "model.embed_tokens.weight" not in stored
    card = (settings.out / "README.md").read_text()
    assert "It proposes the 12 most frequent tokens alone." in card
    assert "target itself continued 40 prompts of 3 to 6 tokens" in card
    assert "at every token that target wrote in held-out texts" in card
    assert "| covered |" in card
    assert "perplexity" not in card
    assert str(tmp_path) not in card


def test_a_narrow_draft_in_8_bits_is_measured_as_it_is_stored_and_leaves_texts_as_they_are(
    settings: DraftSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = list[PreTrainedModel]()

    def measuring(pair: Pair, model: PreTrainedModel, asked: ReportSettings) -> dict[str, DecodingReport]:
        measured.append(model)
        return measure_decoding(pair, model, asked)

    monkeypatch.setattr(distil, "measure_decoding", measuring)
    qualities = make_draft(
        replace(
            settings,
            hidden=None,
            intermediate=5,
            vocabulary=12,
            store="int8",
            report=ReportSettings(report_prompts=1, report_tokens=4),
        )
    )
    stored = load_file(settings.out / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (5, 64)
    assert stored["model.norm.weight"].dtype == torch.float16
    card = (settings.out / "README.md").read_text()
    assert "Stored with matrices in 8 bits, a scale for each row, and all else in float16." in card
    assert "with the 5 strongest of 8 neurons of each layer" in card
    target, tokenizer = load_model(settings.target, dtype=torch.float32)
    loaded, _ = load_model(str(settings.out), dtype=torch.float32, shared_from=target)
    for name, parameter in measured[0].named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))
    assert qualities["notes"].greedy_match > 0.9
    pair = Pair(target, loaded, tokenizer)
    generation = SpeculativeDecoder(pair).generate([5, 9], max_new_tokens=20, knobs={"draft_length": 3})
    assert generation.tokens == AutoregressiveDecoder(pair).generate([5, 9], max_new_tokens=20).tokens
    assert sum(round_.accepted for round_ in generation.rounds) > 0


def test_the_text_that_heads_learnt_from_is_used_again(
    settings: DraftSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = replace(settings.loop, optimiser="adamw", weight_decay=0.0, tokens=32, batch=2, length=16)
    make_medusa(
        MedusaSettings(
            target=settings.target, out=tmp_path / "heads", text=settings.text, own_text=settings.writing, heads=2,
            report_prompts=1, report_tokens=4, loop=loop,
        )
    )  # fmt: skip

    def refused(*_: Any) -> None:
        raise AssertionError("the text was there")

    monkeypatch.setattr(target_text, "continue_rows", refused)
    make_draft(untrained(settings))


def test_a_draft_resumes_only_with_the_tokens_that_it_had(settings: DraftSettings) -> None:
    settings.loop.tokens = 4 * 22
    make_draft(replace(settings, vocabulary=12))
    changes: tuple[dict[str, Any], ...] = ({"vocabulary": 11}, {"vocabulary": 0}, {"own_text": False, "vocabulary": 12})
    for changed in changes:
        loop = replace(settings.loop, length=22) if "own_text" in changed else settings.loop
        with pytest.raises(RuntimeError, match=r"draft\.pt belongs to a run with other settings or text"):
            make_draft(replace(settings, **changed, loop=loop))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocabulary": 301}, r"--vocabulary must be a whole number from 0 to \d+, got 301; 0 takes all"),
        ({"vocabulary": -1}, "--vocabulary must be .* got -1"),
        (
            {"report": ReportSettings(report_draft_length=0)},
            "--report-draft-length must be a whole number of at least 1, got 0",
        ),
        ({"vocabulary": 5, "share": False, "hidden": None}, "--no-share .* leave out --vocabulary"),
        ({"loop": LoopSettings(length=16, device="cpu")}, "whole texts: leave out --length"),
        ({"loop": LoopSettings(batch=100, device="cpu")}, "36 texts to train on are too few for a batch of 100"),
        ({"writing": TextSettings(new_tokens=1)}, "--new-tokens must be a whole number of at least 2, got 1"),
        ({"writing": TextSettings()}, "together more than the model's context of 64 tokens"),
        ({"own_text": False}, "--length 512 is more than the target's context of 64 tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_text_is_made(
    settings: DraftSettings, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("text was made")

    monkeypatch.setattr(distil, "generate_text", refused)
    with pytest.raises(FitError, match=message):
        make_draft(replace(settings, **changed))


def test_a_draft_for_a_model_of_the_hub_points_there(
    settings: DraftSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = counting_model(len(tokenizer))
    target.name_or_path = "someone/model"
    monkeypatch.setattr(distil, "load_model", lambda *_, **__: (target, tokenizer))
    settings.loop.tokens = 1
    taken, fresh = settings.out.with_name("taken"), settings.out.with_name("fresh")
    make_draft(replace(settings, target="alias", out=taken, hidden=None))
    link = read_link(taken)
    assert (link.tokenizer, link.shared_with) == ("someone/model", "someone/model")
    assert not (taken / "tokenizer.json").exists()
    make_draft(replace(settings, target="alias", out=fresh))
    assert (read_link(fresh).tokenizer, read_link(fresh).shared_with) == (None, None)
    assert (fresh / "tokenizer.json").exists()


@pytest.mark.parametrize("vocabulary", [0, 12])
def test_the_card_says_what_the_draft_is_worth_on_the_shipped_prompts(
    settings: DraftSettings, capsys: pytest.CaptureFixture[str], vocabulary: int
) -> None:
    settings = replace(
        settings, hidden=None, vocabulary=vocabulary, report=ReportSettings(report_prompts=2, report_tokens=12)
    )
    make_draft(settings)
    card = (settings.out / "README.md").read_text()
    table = card[card.index("## Decoding") :]
    assert "2 test prompts of each shipped set, at most 12 tokens after each, 4 drafted a round" in table
    assert ("covered |" in table) is bool(vocabulary)
    for name in ("chat", "code", "definitions", "prose"):
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} |")).split("|")
        alpha, tokens_a_round = float(row[2]), float(row[-6])
        assert 0.5 < alpha <= 1  # as good as the target, whose layers do nothing, except for what it cannot say
        assert 2 < tokens_a_round <= 5
    assert "draft: decoding" in capsys.readouterr().out


def test_what_is_measured_of_a_draft_is_what_it_does(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model("llama", vocabulary=len(tokenizer), context=400)
    pair = Pair(model, model, tokenizer)
    perfect = measure_decoding(pair, model, ReportSettings(report_prompts=1, report_tokens=9, report_draft_length=2))
    assert set(perfect) == {"chat", "code", "definitions", "prose"}
    for report in perfect.values():
        assert report.quality.tokens == 9
        assert report.quality.alpha == pytest.approx(1, abs=1e-4)
        assert report.accepted == 1
        assert (report.speed.tokens, report.speed.rounds, report.speed.plain_tokens) == (9, 3, 9)


# Losses and measures


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_divergence_where_the_target_wrote(
    make_model: MakeModel, tmp_path: Path, family: str, reduced: bool
) -> None:
    target = make_model(family, layers=2)
    model, _ = take_layers(target, [0])
    model.eval()  # or dropout would be in the way
    text = a_text(tmp_path)
    states = hidden_states(target, text)
    teacher = output_layer(target).layer
    if reduced:
        reduce_output(model, TOKENS)
        teacher = ReducedOutput(teacher, TOKENS)
    rows = np.array([3, 0])
    chosen = TOKENS if reduced else torch.arange(96)
    expected = []
    for row in rows:
        ids = torch.from_numpy(text.tokens[row, : text.ends[row]].astype(np.int64))[None]
        with torch.no_grad():
            p, q = (scorer(ids).logits[0, text.prompts[row] - 2 : -2, chosen].softmax(-1) for scorer in (target, model))
        expected.append((p * (p.log() - q.log())).sum(-1))
    loss = text_loss(model, teacher, states, rows)
    assert float(loss.detach()) == pytest.approx(float(torch.cat(expected).mean()), rel=2e-3)  # states are in float16
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "layers" in name or ".h." in name)


@pytest.mark.parametrize("reduced", [False, True])
def test_texts_are_measured_where_the_target_wrote(make_model: MakeModel, tmp_path: Path, reduced: bool) -> None:
    target = make_model("llama", layers=2)
    model, _ = take_layers(target, [1])
    model.eval()
    if reduced:
        reduce_output(model, TOKENS)
    text = a_text(tmp_path, rows=12)
    qualities = measure_texts(model, target, text)
    rows = np.flatnonzero((text.side != TRAINING) & (text.domain == 1))
    alpha, covered, kl = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    for row in rows:
        ids = torch.from_numpy(text.tokens[row, : text.ends[row]].astype(np.int64))[None]
        with torch.no_grad():
            p, q = (scorer(ids).logits[0, text.prompts[row] - 1 : -1].softmax(-1) for scorer in (target, model))
        alpha.append(torch.minimum(p, q).sum(-1))
        if reduced:
            covered.append(p[:, TOKENS].sum(-1))
            p, q = p[:, TOKENS] / covered[-1][:, None], q[:, TOKENS]
        kl.append((p * (p.log() - q.log())).sum(-1))
    quality = qualities["two"]
    assert set(qualities) == {"one", "two"}
    assert quality.tokens == int((text.ends - text.prompts)[rows].sum())
    assert quality.alpha == pytest.approx(float(torch.cat(alpha).mean()), rel=1e-4)
    assert quality.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert np.isnan(quality.perplexity) == reduced
    if reduced:
        assert quality.covered == pytest.approx(float(torch.cat(covered).mean()), rel=1e-4)


def test_a_target_that_can_say_half_is_a_perfect_draft_for_itself_there(make_model: MakeModel) -> None:
    target, model = make_model("llama"), make_model("llama")
    reduce_output(model, TOKENS)
    quality = measure(model, torch.randint(96, (3, 17)), target)
    assert quality.kl == pytest.approx(0.0, abs=1e-5)
    assert quality.alpha == pytest.approx(quality.covered, abs=1e-5)
    assert 0 < quality.covered < 1
