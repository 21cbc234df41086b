"""transformers as an engine: its settings have the effect that they say, its counts are true, its traps are avoided."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specgym.decoding import LOOKUP, EngineError, EngineOptions, EngineText, open_engine
from specgym.decoding.engines import transformers as adaptor
from specgym.decoding.engines.transformers import Transformers, plain_folder
from specgym.decoding.engines.workers.transformers_worker import Worker
from specgym.decoding.loading.find_model import load_model

PROMPT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"
TARGET, DRAFT = "tiny-3m", "tiny-3m-draft-1l"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of specgym's own, with the plain folders of the models."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECGYM_CACHE", str(folder))
        yield folder


def loaded(draft: str | None) -> Worker:
    worker = Worker()
    assert "version" in worker.load(plain_folder(TARGET), draft and plain_folder(draft), None)
    return worker


@pytest.fixture(scope="module")
def assisted(cache: Path) -> Worker:
    return loaded(DRAFT)


@pytest.fixture(scope="module")
def looking_up(cache: Path) -> Worker:
    return loaded(None)


def engine(draft: str | None) -> Transformers:
    """The adaptor, whose version needs no worker."""

    class Known(Transformers):
        def version(self) -> str:
            return "5.23.0"

    return Known(TARGET, draft)


def text(
    worker: Worker, settings: Mapping[str, float] | None, temperature: float = 0.0, tokens: int = 24
) -> EngineText:
    return EngineText(**worker.generate(PROMPT, None if settings is None else dict(settings), tokens, temperature, 3))


@pytest.mark.parametrize("length", [1, 3, 8])
def test_a_draft_has_the_tokens_that_are_set_and_the_text_stays_plain(assisted: Worker, length: int) -> None:
    ours = engine(DRAFT)
    setting = ours.setting(length)
    plain, drafted = text(assisted, None), text(assisted, ours.worker_settings(setting))
    assert drafted.tokens == plain.tokens
    assert plain.drafted is plain.accepted is plain.rounds is None
    assert drafted.drafted is not None
    assert drafted.accepted is not None
    assert drafted.rounds is not None
    ours.check_effect(setting, [drafted])
    assert drafted.drafted > length * (drafted.rounds - 2)
    assert drafted.new_tokens == drafted.rounds + drafted.accepted
    assert sum(drafted.accepted_by_place or ()) == drafted.accepted
    assert 1 <= drafted.first_tokens <= length + 1
    assert plain.first_tokens == 1


def test_a_threshold_ends_drafts(assisted: Worker) -> None:
    ours = engine(DRAFT)
    drafted = [text(assisted, ours.worker_settings(ours.setting(8, at))).drafted for at in (0.0, 0.4, 1.0)]
    rounds = text(assisted, ours.worker_settings(ours.setting(8, 1.0))).rounds
    assert (drafted[0] or 0) > (drafted[1] or 0) >= (drafted[2] or 0)
    assert rounds is not None
    assert rounds - 1 <= (drafted[2] or 0) <= rounds  # a token is drafted before it ends the draft


def test_a_length_that_is_an_argument_of_generate_is_ignored(assisted: Worker) -> None:
    """It changes nothing there; the adaptor sets it on the assistant's configuration."""
    text(assisted, {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0})
    counts = assisted._counts
    before = (counts.drafted, counts.rounds)
    ids = torch.tensor([assisted.tokenizer(PROMPT)["input_ids"]])
    counts.drafted, counts.rounds, counts.places = 0, 0, []
    assisted.target.generate(
        ids, assistant_model=assisted.draft, num_assistant_tokens=2, max_new_tokens=24, do_sample=False
    )
    assert (counts.drafted, counts.rounds) == before


def test_prompt_lookup_beside_an_assistant_would_silence_it_so_they_never_meet(assisted: Worker) -> None:
    passes: list[None] = []
    handle = assisted.draft.register_forward_hook(lambda *_: passes.append(None))
    try:
        ids = torch.tensor([assisted.tokenizer(PROMPT)["input_ids"]])
        assisted.target.generate(
            ids, assistant_model=assisted.draft, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False
        )
        assert not passes
        text(
            assisted,
            engine(DRAFT).worker_settings({"num_assistant_tokens": 3.0, "assistant_confidence_threshold": 0.0}),
        )
        assert passes
    finally:
        handle.remove()
    assert not {knob.name for knob in engine(DRAFT).knobs} & {knob.name for knob in engine(LOOKUP).knobs}


def test_lookup_copies_at_most_what_is_set(looking_up: Worker) -> None:
    ours = engine(LOOKUP)
    plain = text(looking_up, None)
    for length in (1, 4):
        setting = ours.setting(length)
        drafted = text(looking_up, ours.worker_settings(setting))
        assert drafted.tokens == plain.tokens
        assert drafted.drafted
        ours.check_effect(setting, [drafted])


def test_sampled_text_follows_its_seed_and_the_drafts_temperature_is_squared(assisted: Worker) -> None:
    """The assistant's scores pass the temperature of the target's processors, and then its own."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    make = assisted._generator_of

    def watched(*arguments: Any, **keywords: Any) -> Any:
        generator = make(*arguments, **keywords)
        draft = generator.get_candidates

        def get_candidates(input_ids: torch.Tensor) -> Any:
            candidates = draft(input_ids)
            if candidates[1] is not None:
                seen.append((input_ids, candidates[1]))
            return candidates

        generator.get_candidates = get_candidates
        return generator

    settings = {"num_assistant_tokens": 2, "assistant_confidence_threshold": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assisted, "_generator_of", watched)
        first = text(assisted, settings, temperature=2.0)
    assert first.tokens == text(assisted, settings, temperature=2.0).tokens
    ids, scores = seen[0]
    with torch.inference_mode():
        plain = assisted.draft(ids).logits[:, -1].float()
    torch.testing.assert_close(scores[:, 0].softmax(-1), (plain / 4).softmax(-1), rtol=1e-4, atol=1e-6)


def renumbered(folder: Path, source: str) -> str:
    """A copy of a model whose tokenizer has two tokens in each other's place."""
    shutil.copytree(source, folder)
    file = folder / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = description["model"]["vocab"]
    (one_token, first), (other, second) = list(vocabulary.items())[-2:]
    vocabulary |= {one_token: second, other: first}
    file.write_text(json.dumps(description), encoding="utf-8")
    return str(folder)


def smaller(folder: Path, source: str) -> str:
    """A copy of a model with fewer tokens."""
    config = AutoConfig.from_pretrained(source, vocab_size=4000)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(source) / file, folder)
    return str(folder)


def test_a_draft_with_other_tokens_is_refused(cache: Path, tmp_path: Path) -> None:
    """transformers takes one, given both tokenizers, and changes its output layer for good when it samples."""
    source = plain_folder(DRAFT)
    for draft, reason in (
        (renumbered(tmp_path / "renumbered", source), "numbers its tokens otherwise than the target"),
        (smaller(tmp_path / "smaller", source), "has 4000 tokens and the target 4096"),
    ):
        refused = Worker().load(plain_folder(TARGET), draft, None)["refused"]
        assert reason in refused
        assert "for good" in refused


def test_what_only_specgym_reads_becomes_a_plain_folder_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plain_folder(DRAFT)
    assert Path(folder).parent == cache / "engines"
    monkeypatch.setattr("specgym.decoding.loading.find_model.load_model", lambda *_, **__: pytest.fail("loaded again"))
    assert plain_folder(DRAFT) == folder
    assert plain_folder(folder) == folder  # a plain folder is taken as it is
    assert plain_folder("owner/model") == "owner/model"  # and so is what may be at the hub


def test_a_draft_of_some_tokens_scores_the_others_zero(tmp_path: Path) -> None:
    from specgym.decoding.models.output_layer import reduce_output

    model, _ = load_model(DRAFT, device="cpu")
    before: torch.Tensor = model(torch.tensor([[5, 6]])).logits
    reduce_output(model, torch.arange(10, 50))
    adaptor._score_all(model)
    model.save_pretrained(tmp_path)
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path).float()
    scores = whole(torch.tensor([[5, 6]])).logits
    torch.testing.assert_close(scores[..., 10:50], before[..., 10:50])
    assert not scores[..., :10].any()
    assert not scores[..., 50:].any()


def test_the_engines_knobs_are_transformers_own() -> None:
    assert engine(DRAFT).defaults == {"num_assistant_tokens": 20.0, "assistant_confidence_threshold": 0.4}
    assert engine(LOOKUP).defaults == {"prompt_lookup_num_tokens": 10.0, "max_matching_ngram_size": 2.0}
    assert engine(DRAFT).setting(4, 0.3) == {"num_assistant_tokens": 4.0, "assistant_confidence_threshold": 0.3}
    assert engine(LOOKUP).setting(4) == {"prompt_lookup_num_tokens": 4.0, "max_matching_ngram_size": 2.0}


@pytest.mark.engines
@pytest.mark.parametrize("draft", [DRAFT, LOOKUP])
def test_transformers_in_an_interpreter_of_its_own(cache: Path, draft: str) -> None:
    texts: list[Sequence[int] | None] = []
    with open_engine("transformers", TARGET, draft, EngineOptions(threads=1)) as running:
        for knobs in (None, running.defaults, running.setting(3)):
            answer = running.serve(knobs).generate(PROMPT, 24)
            texts.append(answer.tokens)
            if knobs is not None:
                running.check_effect(knobs, [answer])
        with pytest.raises(EngineError, match="transformers failed"):
            running.serve(None).generate([10**6], 4)
        assert running.version().count(".") == 2
    assert texts[0] == texts[1] == texts[2]


def test_a_model_that_does_not_load_is_named(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    for target, draft, named in (
        (str(tmp_path), None, f"the target {tmp_path} is no folder or hub id that it can load"),
        (plain_folder(TARGET), str(tmp_path / "notes.txt"), f"the draft {tmp_path / 'notes.txt'} is no folder"),
    ):
        assert named in Worker().load(target, draft, None)["refused"]
