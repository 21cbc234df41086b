"""Drafts of targets with an encoder: texts written after sources, losses, folders, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.drafts.mixed import draft_models
from specgym.decoding.errors import FitError
from specgym.decoding.fit.draft import distil, on_policy
from specgym.decoding.fit.draft.distil import DraftSettings, MoreTextSettings, make_draft
from specgym.decoding.fit.draft.init_from_target import take_layers
from specgym.decoding.fit.draft.objectives import measure_texts, text_loss
from specgym.decoding.fit.draft.report import ReportSettings
from specgym.decoding.fit.loop import Outcome, train
from specgym.decoding.fit.settings import LoopSettings, TextSettings
from specgym.decoding.fit.text import states, target_text
from specgym.decoding.fit.text.prompts import JUDGING, SPEED, TRAINING, line_sources
from specgym.decoding.fit.text.states import states_after_sources
from specgym.decoding.fit.text.target_text import TargetText, continue_rows
from specgym.decoding.loading.checkpoint import load_checkpoint
from specgym.decoding.loading.find_model import load_model
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.encoder.encoder_decoder import EncoderDecoder, start_token
from specgym.decoding.models.output_layer import ReducedOutput, output_layer, reduce_output
from tests.helpers.counting import words
from tests.helpers.encoder_decoders import KINDS, SOURCE, encoder_decoder, stock_tokens

SOURCES = [SOURCE, SOURCE[:3], SOURCE[2:9]]
TOKENS = torch.arange(0, 96, 3)


@pytest.fixture
def make_settings(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., DraftSettings]:
    """Settings for a target of some kind with three decoder layers, which is written into a folder."""

    def make(kind: str, **changed: Any) -> DraftSettings:
        encoder_decoder(kind, layers=3, vocabulary=len(tokenizer)).save_pretrained(tmp_path / "target")
        tokenizer.save_pretrained(tmp_path / "target")
        (tmp_path / "notes.txt").write_text("\n".join(words(400).split("\n\n")))
        settings = DraftSettings(
            target=str(tmp_path / "target"),
            out=tmp_path / "draft",
            text=(tmp_path / "notes.txt",),
            writing=TextSettings(texts=24, new_tokens=12, generate_batch=24),
            loop=LoopSettings(
                tokens=10 * 4 * 12,
                batch=4,
                learning_rate=1e-2,
                optimiser="adamw",
                bfloat16=False,
                device="cpu",
                work=tmp_path / "work",
            ),
        )
        return replace(settings, **changed)

    return make


def a_text(model: Any, folder: Path) -> TargetText:
    """Random texts after three sources, one of them held out."""
    rng, ends = np.random.default_rng(0), np.array([9, 4, 7])
    tokens = rng.integers(3, 96, (3, 9)).astype(np.int32)
    tokens[:, 0] = start_token(model)
    side, domain = np.array([TRAINING, TRAINING, JUDGING]), np.zeros(3, dtype=np.int64)
    return TargetText(tokens, np.ones(3, dtype=np.int64), ends, domain, side, ("one",), "0" * 64, folder, SOURCES)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_written_together_are_those_of_generate(kind: str) -> None:
    model = encoder_decoder(kind, layers=2)
    model.generation_config.forced_bos_token_id = 40  # as a translator into several languages has
    model.generation_config.num_beams = 2  # which is set aside
    settings = TextSettings(new_tokens=9, temperature=0.0)
    ends = set(stock_tokens(model, max_new_tokens=9)[4:5])
    texts = continue_rows(model, SOURCES, ends, settings, 0)
    for source, text in zip(SOURCES, texts, strict=True):
        assert text == [start_token(model), *stock_tokens(model, source, max_new_tokens=9, eos_token_id=list(ends))]
        assert text[1] == 40


def test_a_decoder_deeper_than_its_encoder_writes_what_it_would_without_a_cache() -> None:
    model = encoder_decoder("t5", layers=3)
    (text,) = continue_rows(model, [SOURCE], (), TextSettings(new_tokens=9, temperature=0.0), 0)
    assert text[1:] == stock_tokens(model, max_new_tokens=9, use_cache=False)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_lowers_the_divergence_from_what_the_target_says_after_its_sources(
    kind: str, reduced: bool, tmp_path: Path
) -> None:
    target = encoder_decoder(kind, layers=2, dropout_rate=0.0) if kind == "t5" else encoder_decoder(kind, layers=2)
    target.requires_grad_(False)
    if kind != "t5":
        target.final_logits_bias += torch.linspace(0, 3, 96)
    draft, _ = take_layers(target, [1])
    draft.eval()  # or dropout would be in the way
    text = a_text(target, tmp_path)
    known = states_after_sources(target, text)
    teacher: Any = output_layer(target).layer
    if reduced:
        reduce_output(draft, TOKENS)
        teacher = ReducedOutput(teacher, TOKENS)
    chosen, expected = TOKENS if reduced else torch.arange(96), []
    for row in (0, 1):
        ids = torch.from_numpy(text.tokens[row, : text.ends[row] - 1].astype(np.int64))[None]
        inputs = {"input_ids": torch.tensor([SOURCES[row]]), "decoder_input_ids": ids}
        with torch.no_grad():
            p, q = (model(**inputs).logits[0][:, chosen].softmax(-1) for model in (target, draft))
        expected.append((p * (p.log() - q.log())).sum(-1))
    loss = text_loss(draft, teacher, known, np.array([1, 0]))
    assert float(loss.detach()) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-2)  # states in float16
    learning = [weight for weight in draft.parameters() if weight.requires_grad]
    assert {id(weight) for weight in learning} == {
        id(weight) for name, weight in draft.get_decoder().named_parameters() if "embed_" not in name
    }
    optimiser = torch.optim.AdamW(learning, lr=1e-3)
    loss.backward()
    optimiser.step()
    assert text_loss(draft, teacher, known, np.array([1, 0])) < loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_of_decoder_layers_has_all_else_from_its_target(kind: str) -> None:
    target = encoder_decoder(kind, layers=3)
    draft, shared = take_layers(target, [2, 1])
    held, drafted = (model.state_dict(keep_vars=True) for model in (target, draft))
    assert all(drafted[name] is held[there] for name, there in shared.items())
    lent = {id(held[name]) for name in shared.values()}
    apart = {name for name, weight in drafted.items() if id(weight) not in lent}
    assert all("decoder." in name and "embed_" not in name for name in apart)
    assert len(draft.get_decoder().block if kind == "t5" else draft.get_decoder().layers) == 2
    inputs = {"input_ids": torch.tensor([SOURCE]), "decoder_input_ids": torch.tensor([[0, 3]])}
    whole, _ = take_layers(target, [0, 1, 2])
    with torch.inference_mode():
        expected = target(**inputs).logits
        assert torch.equal(whole.eval()(**inputs).logits, expected)
        assert not torch.equal(draft.eval()(**inputs).logits, expected)


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_held_out_texts_are_measured_after_their_sources(kind: str, tmp_path: Path) -> None:
    target = encoder_decoder(kind, layers=2)
    draft, _ = take_layers(target, [0])
    quality = measure_texts(draft.eval(), target, a_text(target, tmp_path))["one"]
    text = a_text(target, tmp_path)
    inputs = {"input_ids": torch.tensor([SOURCES[2]]), "decoder_input_ids": torch.tensor(text.tokens[2:, :6]).long()}
    with torch.no_grad():
        p, q = (model(**inputs).logits[0].softmax(-1) for model in (target, draft))
    assert quality.tokens == 6
    assert quality.alpha == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("t5", {"vocabulary": 40, "store": "int8", "report": ReportSettings(report_prompts=2, report_tokens=8)}),
        ("bart", {"intermediate": 17, "take": (2, 0)}),
        ("marian", {"share": False}),
        ("pegasus", {}),
    ],
)
def test_a_folder_is_a_draft_of_its_target(
    make_settings: Callable[..., DraftSettings], monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    settings, losses = make_settings(kind, **options), list[float]()

    def watched(draft: Any, loss: Any, batches: Any, *others: Any, **more: Any) -> Outcome:
        losses.append(float(loss(batches(0)).detach()))
        outcome = train(draft, loss, batches, *others, **more)
        losses.append(float(loss(batches(0)).detach()))
        return outcome

    monkeypatch.setattr(on_policy, "train", watched)
    qualities = make_draft(settings)
    assert set(qualities) == {"notes"}
    assert losses[1] < losses[0]
    target, tokenizer = load_model(settings.target, dtype=torch.float32)
    draft, _ = load_model(str(settings.out), dtype=torch.float32, shared_from=target if settings.share else None)
    pair = Pair(target, draft, tokenizer)
    (drafter,) = draft_models(pair.draft)
    assert isinstance(drafter, EncoderDecoder)
    assert drafter.shares_encoder_with(target) is settings.share  # the target's numbers do not fit into float16
    stored = load_file(settings.out / "model.safetensors")
    assert any("encoder" in name and "encoder_attn" not in name for name in stored) is not settings.share
    expected = AutoregressiveDecoder(pair).generate(SOURCE, max_new_tokens=12)
    drafted = SpeculativeDecoder(pair).generate(SOURCE, max_new_tokens=12, knobs={"draft_length": 3})
    more: Any = {"max_new_tokens": 12, "use_cache": False, "eos_token_id": list(pair.eos_token_ids)}
    assert drafted.tokens == expected.tokens == stock_tokens(target, **more)
    if not settings.share:
        alone = AutoModelForSeq2SeqLM.from_pretrained(settings.out, dtype=torch.float32)
        inputs = {"input_ids": torch.tensor([SOURCE]), "decoder_input_ids": torch.tensor([[2, 5, 6]])}
        with torch.no_grad():
            torch.testing.assert_close(alone(**inputs).logits, load_checkpoint(settings.out)(**inputs).logits)
    card = (settings.out / "README.md").read_text()
    assert "begun from decoder layer" in card
    assert "target itself wrote a text of at most 12 tokens after each source, at temperature 0.3" in card
    assert "| notes |" in card
    assert ("sources of each set, none of which it learned from" in card) is bool(settings.report.report_prompts)


def test_a_killed_run_goes_on_where_it_was(
    make_settings: Callable[..., DraftSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("\n".join(f"the token {number}" for number in range(9)))
    more = MoreTextSettings(prompt_sets=(str(tmp_path / "mine.txt"),), continuations=2)
    settings = make_settings("t5", more_text=more)
    whole, parts = (replace(settings, out=settings.out.with_name(name)) for name in ("whole", "parts"))
    make_draft(whole)

    def killed(*arguments: Any, **more: Any) -> None:
        train(*arguments, **{**more, "stop_after": 4})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(on_policy, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            make_draft(parts)
    monkeypatch.setattr(target_text, "continue_rows", lambda *_: pytest.fail("the text was there"))
    monkeypatch.setattr(states, "_compute", lambda *_: pytest.fail("the states were there"))
    assert set(make_draft(parts)) == {"notes", "mine prompts"}
    weights = [(settings.out / "model.safetensors").read_bytes() for settings in (whole, parts)]
    assert weights[0] == weights[1]  # also where dropout drops something


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": ()}, "target has an encoder, which reads sources: give some by --text or --prompt-sets"),
        ({"corpus": Path("mine")}, "leave out --corpus, since its documents are no sources"),
        ({"hidden": 32}, "leave out --hidden, since its drafts are made of layers of its decoder: give --layers"),
        ({"intermediate": 8}, "T5Block has no feed-forward part .*: leave out --intermediate"),
        ({"more_text": MoreTextSettings(plain_texts=4)}, "leave out --plain-texts"),
        ({"more_text": MoreTextSettings(own_prompts=9)}, "leave out --own-prompts, since it does not chat"),
        (
            {"more_text": MoreTextSettings(answer_tokens=9)},
            "leave out --answer-tokens, since --new-tokens is the length",
        ),
        ({"on_policy": 1}, "leave out --on-policy, since its drafts learn from the target's texts alone"),
        ({"writing": TextSettings(prompt_tokens=32)}, "leave out --prompt-tokens, since its encoder reads whole"),
        ({"loop": LoopSettings(length=16, device="cpu")}, "leave out --length, since a step takes whole texts"),
        (
            {"loop": LoopSettings(batch=90, device="cpu")},
            "sources to train on are too few for a batch of 90",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_text_is_written(
    make_settings: Callable[..., DraftSettings],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(distil, "generate_text", lambda *_: pytest.fail("text was made"))
    with pytest.raises(FitError, match=message):
        make_draft(make_settings("t5", **changed))


def test_sources_are_lines_or_paragraphs_and_on_one_side_each(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lines = [f"the model {number}" for number in range(40)]
    (tmp_path / "lines.txt").write_text("\n".join([*lines, *lines[:9], "token " * 90]))
    (tmp_path / "paragraphs.txt").write_text("\n\n".join(f"a draft {number}\nand more" for number in range(20)))
    paths = (tmp_path / "lines.txt", tmp_path / "paragraphs.txt")
    prompts = line_sources(tokenizer, paths, 80, 30, 0)
    assert np.bincount(prompts.domain).tolist() == [39, 20] or np.bincount(prompts.domain).tolist() == [40, 20]
    assert len({tuple(row) for row in prompts.rows}) == len(prompts.rows)
    assert {tokenizer.decode(row) for row, place in zip(prompts.rows, prompts.domain, strict=True) if place} == {
        f"a draft {number}\nand more" for number in range(20)
    }
    assert all(set(prompts.side[prompts.domain == place].tolist()) == {TRAINING, JUDGING, SPEED} for place in (0, 1))
    assert (prompts.side == TRAINING).mean() > 0.8
    assert "lines.txt: " in prompts.sources[0]
    assert len(line_sources(tokenizer, paths, 20, 30, 0).rows) == 20
    with pytest.raises(FitError, match="'paragraphs' has 0 sources of at most 2 tokens"):
        line_sources(tokenizer, paths[1:], 80, 2, 0)
