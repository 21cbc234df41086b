"""The fit commands on tiny random models: the training loop, distillation, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import tyro
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recipes.corpus import write_corpus
from recipes.sources import Document
from recipes.target import TargetSettings, make_target
from recipes.tokenizer import TokenizerSettings, make_tokenizer
from specgym.decoding.errors import FitError, TrainingError
from specgym.decoding.fit.__main__ import main
from specgym.decoding.fit.draft.distil import DraftSettings, make_draft
from specgym.decoding.fit.draft.init_from_target import fresh, spread, take_layers
from specgym.decoding.fit.loop import learning_rate, train
from specgym.decoding.fit.measure import measure
from specgym.decoding.fit.settings import LoopSettings
from specgym.decoding.fit.text.corpus_text import Windows, read_plain
from specgym.decoding.loading.checkpoint import load_checkpoint
from tests.helpers.counting import words

FAMILIES = ("llama", "gpt2", "opt", "gpt_neox")


def random_model(family: str, vocabulary: int = 60) -> PreTrainedModel:
    """A target of three layers whose weights are large enough for its distributions to have a shape."""
    torch.manual_seed(1)
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=3, initializer_range=0.2,
                num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True, **special,
            )
        )  # fmt: skip
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_embd=16, n_layer=3, n_head=2, n_positions=128, initializer_range=0.2,
                attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **special,
            )
        )  # fmt: skip
    if family == "opt":
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=vocabulary, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2,
                max_position_embeddings=128, word_embed_proj_dim=16, dropout=0.0, init_std=0.2, **special,
            )
        )  # fmt: skip
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                max_position_embeddings=128, initializer_range=0.2, **special,
            )
        )  # fmt: skip
    return BloomForCausalLM(BloomConfig(vocab_size=vocabulary, hidden_size=16, n_layer=3, n_head=2, **special))


@pytest.fixture
def settings(tmp_path: Path) -> LoopSettings:
    return LoopSettings(tokens=20 * 4 * 16, batch=4, length=16, bfloat16=False, work=tmp_path / "work", device="cpu")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of three domains, written as the command writes it."""
    documents = {
        domain: [Document(f"{domain}/{i}", f"{domain} {i}", words(300, i)) for i in range(30)]
        for domain in ("prose", "code", "definitions")
    }
    write_corpus(documents, tmp_path / "corpus", {domain: f"{domain}; free" for domain in documents})
    return tmp_path / "corpus"


# The loop


def language_model_loss(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    out = model(input_ids=batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten())


def run(settings: LoopSettings, state: Path, stop_after: int | None = None) -> tuple[PreTrainedModel, float]:
    model = random_model("llama")
    windows = Windows(np.random.default_rng(0).integers(0, 60, 3000).astype(np.int32), 4, 16, 0)
    outcome = train(model, lambda b: language_model_loss(model, b), windows, settings, state, stop_after=stop_after)
    return model, outcome.loss


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    tmp_path: Path, settings: LoopSettings, optimiser: Literal["muon", "adamw"]
) -> None:
    settings = replace(settings, optimiser=optimiser)
    whole, whole_loss = run(settings, tmp_path / "whole.pt")
    run(settings, tmp_path / "parts.pt", stop_after=7)
    run(settings, tmp_path / "parts.pt", stop_after=6)
    resumed, loss = run(settings, tmp_path / "parts.pt")
    assert loss == whole_loss
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    finished, _ = run(settings, tmp_path / "parts.pt")
    assert torch.equal(finished.lm_head.weight, whole.lm_head.weight)


def test_a_state_of_another_run_is_refused(tmp_path: Path, settings: LoopSettings) -> None:
    run(settings, tmp_path / "state.pt", stop_after=1)
    with pytest.raises(TrainingError, match=r"state\.pt belongs to a run with other settings"):
        run(replace(settings, learning_rate=1e-4), tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(TrainingError, match=r"state\.pt is damaged"):
        run(settings, tmp_path / "state.pt")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, settings: LoopSettings) -> None:
    model = random_model("llama")
    windows = Windows(np.zeros(3000, dtype=np.int32), 4, 16, 0)
    with pytest.raises(TrainingError, match="the loss became nan at step 0: use a lower --learning-rate"):
        train(model, lambda b: language_model_loss(model, b) * torch.nan, windows, settings, tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()


def test_a_wall_clock_budget_ends_the_run(tmp_path: Path, settings: LoopSettings) -> None:
    _, loss = run(replace(settings, tokens=10**9, minutes=0.001), tmp_path / "state.pt")
    assert loss < 10


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(progress, 0.1) for progress in np.linspace(0, 1, 21)]
    assert 0 < rates[0] < rates[1] < rates[2] == 1.0
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


# Drafts


@pytest.mark.parametrize("family", FAMILIES)
def test_taking_every_layer_gives_the_target(family: str) -> None:
    target = random_model(family).eval()
    draft, _ = take_layers(target, [0, 1, 2])
    ids = torch.arange(20)[None]
    torch.testing.assert_close(draft.eval()(ids).logits, target(ids).logits)
    assert draft.get_input_embeddings().weight is target.get_input_embeddings().weight


def test_layers_that_do_not_exist_or_cannot_be_found_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layers 0 to 2, not 3"):
        take_layers(random_model("llama"), [0, 3])
    with pytest.raises(ValueError, match="1 to 3 layers"):
        spread(4, 3)
    odd = random_model("llama")
    odd.model.layers = nn.Sequential(*odd.model.layers)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM keeps its layers in none of model\.layers"):
        take_layers(odd, [0])


def test_spread_takes_the_ends_first() -> None:
    assert [spread(n, 12) for n in (1, 2, 3)] == [[0], [0, 11], [0, 6, 11]]


@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_a_fresh_draft_speaks_the_vocabulary_of_its_target(family: str) -> None:
    draft = fresh(random_model(family), layers=1, hidden=16)
    assert draft(torch.arange(5)[None]).logits.shape == (1, 5, 60)
    with pytest.raises(ValueError, match="--hidden 15"):
        fresh(random_model(family), layers=1, hidden=15)


def test_a_model_is_a_perfect_draft_for_itself() -> None:
    model = random_model("llama").eval()
    quality = measure(model, torch.randint(60, (3, 17)), model)
    assert quality.alpha == pytest.approx(1.0, abs=1e-5)
    assert quality.kl == pytest.approx(0.0, abs=1e-5)
    assert quality.greedy_match == 1.0
    assert quality.tokens == 48


@pytest.mark.parametrize(("family", "hidden"), [("llama", None), ("gpt2", None), ("opt", None), ("gpt2", 16)])
def test_distilling_any_target_raises_alpha_and_the_folder_loads(
    tmp_path: Path, settings: LoopSettings, tokenizer: PreTrainedTokenizerBase, family: str, hidden: int | None
) -> None:
    target = random_model(family, len(tokenizer)).eval()
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "notes.txt").write_text(words(9000))
    chosen = DraftSettings(
        target=str(tmp_path / "target"), out=tmp_path / "draft", text=(tmp_path / "notes.txt",), hidden=hidden,
        loop=replace(settings, tokens=80 * 64, learning_rate=1e-2),
    )  # fmt: skip
    untrained = replace(chosen, out=tmp_path / "none", loop=replace(settings, tokens=1, learning_rate=1e-9))
    before, after = make_draft(untrained)["notes"], make_draft(chosen)["notes"]
    assert after.alpha > before.alpha + 0.02
    assert after.kl < before.kl
    ids = torch.arange(30)[None]
    torch.testing.assert_close(
        load_checkpoint(tmp_path / "draft")(ids).logits,
        load_checkpoint(tmp_path / "draft", shared_from=target)(ids).logits,
    )
    card = (tmp_path / "draft/README.md").read_text()
    assert "| notes |" in card
    assert "still going on" not in card
    stored = (tmp_path / "draft/model.safetensors").stat().st_size
    whole = (tmp_path / "target/model.safetensors").stat().st_size
    assert hidden is not None or stored < whole / 4


def test_a_draft_that_shares_nothing_is_a_folder_of_its_own(
    tmp_path: Path, settings: LoopSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    random_model("llama", len(tokenizer)).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "notes.txt").write_text(words(9000))
    make_draft(
        DraftSettings(
            target=str(tmp_path / "target"), out=tmp_path / "draft", text=(tmp_path / "notes.txt",), share=False,
            loop=settings,
        )
    )  # fmt: skip
    ids = torch.arange(30)[None]
    alone = LlamaForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    torch.testing.assert_close(alone(ids).logits, load_checkpoint(tmp_path / "draft")(ids).logits)


def test_text_that_is_too_short_is_refused(
    tmp_path: Path, settings: LoopSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    random_model("llama", len(tokenizer)).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "notes.txt").write_text("short")
    with pytest.raises(ValueError, match="'notes' is too short"):
        make_draft(
            DraftSettings(
                target=str(tmp_path / "target"), out=tmp_path / "d", text=(tmp_path / "notes.txt",), loop=settings
            )
        )
    with pytest.raises(FileNotFoundError, match="no text in"):
        read_plain([tmp_path / "nowhere"])


# The command line, end to end


def test_the_commands_make_a_family_from_a_corpus(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["target", "--out", "models/t"])
    make_tokenizer(TokenizerSettings(corpus=Path("corpus"), out=Path("models/tokenizer"), vocabulary=280))
    loop = ["--tokens", "200", "--batch", "2", "--length", "16", "--corpus", "corpus", "--licence", "mit"]
    shape = ["--hidden", "16", "--intermediate", "16", "--layers", "2", "--heads", "2"]
    arguments = ["--out", "models/t", "--tokenizer", "models/tokenizer", *shape, *loop]
    make_target(tyro.cli(TargetSettings, args=arguments))
    main(["draft", "--target", "models/t", "--out", "models/d", "--take", "1", *loop])
    link = json.loads((tmp_path / "models/d/specgym.json").read_text())
    assert link["tokenizer"] == "../tokenizer"
    assert link["shared_with"] == "../t"
    assert load_checkpoint(tmp_path / "models/d")(torch.arange(9)[None]).logits.shape == (1, 9, 280)
    card = (tmp_path / "models/t/README.md").read_text()
    assert "python -m recipes.target --out models/t" in card
    assert "license: mit" in card
    assert all(f"| {domain} |" in card for domain in ("prose", "code", "definitions"))
    assert str(tmp_path) not in card


def test_a_command_that_became_a_recipe_is_named() -> None:
    with pytest.raises(FitError, match=r"python -m recipes\.corpus"):
        main(["corpus"])


@pytest.mark.parametrize("command", ["medusa", "eagle"])
def test_a_target_with_an_encoder_is_refused_by_name(command: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"tiny-translator has an encoder.*prompt-lookup, suffix, or .*fit draft"):
        main([command, "--target", "tiny-translator", "--out", str(tmp_path / "out")])
