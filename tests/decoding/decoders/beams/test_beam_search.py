"""Beam search gives, token for token, what `generate(num_beams=...)` gives, and stores what beams share once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from specgym.decoding.decoders.beams.decoder import BeamSearchDecoder, BeamTree
from specgym.decoding.errors import ArgumentError, KnobError, UnsupportedModelError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.kv_cache import TokenTree
from specgym.decoding.sampling import Sampling

MakeModel = Callable[..., PreTrainedModel]
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7], [11, 8, 8, 1]]
ENDS = [[], [6], [6, 13]]
NEW = 16
CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("llama", 2, {}, {}),
    ("gpt2", 3, {"length_penalty": 2.0}, {}),
    ("opt", 4, {"early_stopping": True}, {}),
    ("qwen2", 4, {"length_penalty": -1.0, "early_stopping": "never"}, {}),
    ("gpt_neox", 3, {"length_penalty": 0.0, "early_stopping": "never"}, {}),
    ("llama", 4, {"length_penalty": 1.5, "early_stopping": "never"}, {}),
    ("mistral", 2, {"length_penalty": 0.5, "early_stopping": True}, {"sliding_window": 8}),
    ("llama", 3, {}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}),
]


@pytest.mark.parametrize(("family", "beams", "options", "settings"), CASES)
def test_texts_and_scores_are_those_of_generate(
    make_model: MakeModel, family: str, beams: int, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    window = {"sliding_window": settings["sliding_window"]} if "sliding_window" in settings else {}
    model = make_model(family, vocabulary=24, spread=0.2, **window)
    for number in {len(family) % 3, beams % 3}:
        prompt, ends = PROMPTS[number], ENDS[number]
        model.generation_config.eos_token_id = ends or None
        model.generation_config.pad_token_id = 0
        rules = {name: value for name, value in settings.items() if name not in window}
        for name, value in rules.items():
            setattr(model.generation_config, name, value)
        expected = cast(Any, model).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=beams,
            num_return_sequences=1,
            do_sample=False,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        session = BeamSearchDecoder(Pair(model), num_beams=beams, **options).start(prompt, max_new_tokens=NEW)
        rounds = []
        while not session.finished:
            rounds.append(session.step())
        assert session.tokens == expected.sequences[0, len(prompt) :].tolist()
        assert session.hypotheses[0][1] == pytest.approx(float(expected.sequences_scores[0]), abs=1e-4)
        assert session.tokens == [token for round_ in rounds for token in round_.tokens]
        assert all(round_.tokens for round_ in rounds)
        assert session.finish_reason == ("eos" if session.tokens[-1] in ends else "length")
        assert sum(round_.target_tokens for round_ in rounds) <= 1 + (NEW - 1) * beams


@pytest.mark.parametrize(("family", "window"), [("gpt2", {}), ("mistral", {"sliding_window": 6})])
def test_what_beams_share_is_stored_once(make_model: MakeModel, family: str, window: dict[str, int]) -> None:
    model = make_model(family, vocabulary=24, **window)
    prompt = list(range(20)) * 5
    session = BeamSearchDecoder(Pair(model), num_beams=4).start(prompt, max_new_tokens=44)
    longest = 0
    while not session.finished:
        session.step()
        longest = max(longest, session.target.length)
        assert session.target.length >= len(session.context) - 1
    assert longest < 250  # transformers keeps 4 times 144
    assert len(session._depths) < 120  # what all have in common has left the tree
    expected = cast(Any, model).generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 100), num_beams=4, do_sample=False, max_new_tokens=44
    )
    assert session.tokens == expected[0, 100:].tolist()
    assert len(session.hypotheses) == 4
    scores = [score for _, score in session.hypotheses]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(tokens) for tokens, _ in session.hypotheses}) == 4


def test_a_beam_tree_is_a_token_tree_of_which_the_last_nodes_are_read() -> None:
    whole = TokenTree([-1, -1, 0, 0, 2, 3, 1])
    tree = BeamTree([0, 0, 1, 1, 2, 2, 1], [[0, 2, 4], [0, 3, 5], [1, 6]])
    assert tree.depths.tolist() == whole.depths.tolist()
    assert (len(tree), tree.height) == (7, 3)
    assert torch.equal(tree.visible, whole.visible[-3:])


def test_beams_of_a_batch_read_together_and_give_the_same_texts(make_model: MakeModel) -> None:
    decoder = BeamSearchDecoder(Pair(make_model("llama", vocabulary=24)), num_beams=3)
    alone = [decoder.generate(prompt, max_new_tokens=8).tokens for prompt in PROMPTS]
    together = decoder.generate_batch(PROMPTS, max_new_tokens=8)
    assert [text.tokens for text in together] == alone


def test_settings_come_from_the_generation_config(make_model: MakeModel, recwarn: pytest.WarningsRecorder) -> None:
    model = make_model("llama", vocabulary=24)
    assert BeamSearchDecoder(Pair(model)).num_beams == 4
    model.generation_config.num_beams = 3
    model.generation_config.length_penalty = 0.5
    model.generation_config.early_stopping = True
    decoder = BeamSearchDecoder(Pair(model))
    assert (decoder.num_beams, decoder.length_penalty, decoder.early_stopping) == (3, 0.5, True)
    assert not recwarn.list
    assert BeamSearchDecoder(Pair(model), num_beams=2, early_stopping=False).early_stopping is False


def test_what_beams_cannot_do_is_refused_by_name(make_model: MakeModel) -> None:
    model = make_model("llama", vocabulary=24)
    pair = Pair(model)
    decoder = BeamSearchDecoder(pair)
    with pytest.raises(ArgumentError, match="beams are not sampled"):
        decoder.start([1], max_new_tokens=3, sampling=Sampling())
    with pytest.raises(KnobError, match="no knob 'beams'"):
        decoder.generate([1], max_new_tokens=3, knobs={"beams": 3})
    for wrong in ({"num_beams": 1}, {"num_beams": 25}, {"length_penalty": "long"}, {"early_stopping": "soon"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            BeamSearchDecoder(pair, **cast(Any, wrong))
    model.generation_config.diversity_penalty = 0.5
    with pytest.raises(ArgumentError, match=r"diversity_penalty=0\.5 asks for diverse beams"):
        BeamSearchDecoder(pair)


def test_a_target_that_reads_chains_alone_is_refused(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(make_model("llama", vocabulary=24))
    monkeypatch.setattr(pair.target, "branches", False)
    with pytest.raises(UnsupportedModelError, match="target of BeamSearchDecoder"):
        BeamSearchDecoder(pair)
