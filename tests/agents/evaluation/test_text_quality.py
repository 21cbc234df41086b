"""Likeness of texts to references: scores counted by hand, their bootstrap, and the column of live judgements."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest

from recipes.tokenizer import train_tokenizer
from specgym.agents import Contender, TextQualityError, judge_live, text_quality
from specgym.agents.command_line import evaluate_command, train_command
from specgym.agents.evaluation import live
from specgym.agents.evaluation.contenders import live_verdict
from specgym.agents.evaluation.live import live_columns
from specgym.agents.evaluation.results import LEARNED, PLAIN, ResultTable, Row, mean_rows
from specgym.agents.evaluation.text_quality import scored_texts
from specgym.decoding import (
    ArgumentError,
    AutoregressiveDecoder,
    LatencyProfile,
    Pair,
    PromptSet,
    Sampling,
    ThresholdDecoder,
)
from specgym.envs import RewardSettings, Workload
from tests.helpers.counting import words

PROFILE = LatencyProfile("pair", {0: 0.0, 16: 0.016}, {1: 0.010, 17: 0.014}, 0.010, {"name": "made up"})
EXACT, STRAYING = {"fallback": 0.0, "rollback": 1.0}, {"fallback": 0.95, "rollback": 1.0}
TOKENS = 9
MAT = "the cat sat on the mat", "the cat sat on a mat"
"""A text of which 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples are in its reference."""
INSTALL = r'pip install "specgym\[quality\]"'


def test_bleu_is_that_of_all_texts_together() -> None:
    single = text_quality([MAT[0]], [MAT[1]])
    assert single.score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    two = text_quality([MAT[0], "a dog"], [MAT[1], ["a dog barks"]])
    shorter = math.exp(1 - 9 / 8)  # 8 words where the references have 9
    assert two.score == pytest.approx(100 * shorter * (7 / 8 * 4 / 6 * 2 / 4 * 1 / 3) ** 0.25)
    assert (two.texts, two.measure) == (2, "bleu")
    assert two.signature == f"sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version('sacrebleu')}"
    several = text_quality([MAT[0]], [["a dog", MAT[0]]])
    assert several.score == pytest.approx(100)
    assert "nrefs:2" in several.signature
    assert str(several).startswith("BLEU 100.0 (1 text, sacrebleu nrefs:2|")


def test_bleu_of_many_texts_is_what_the_library_says_of_the_corpus() -> None:
    import sacrebleu

    words, rng = ["the", "a", "cat", "dog", "sat", "on", "under", "mat", ",", "."], np.random.default_rng(0)
    texts, references = ([" ".join(rng.choice(words, 3 + place % 9)) for place in range(40)] for _ in range(2))
    both = [[text, references[-place]] if place % 3 else [text] for place, text in enumerate(references)]
    further = [several[1] if len(several) > 1 else None for several in both]
    expected = sacrebleu.BLEU().corpus_score(texts, [references, further]).score  # type: ignore[list-item]  # or None
    quality = text_quality(texts, both)
    assert quality.score == pytest.approx(expected)
    assert 0 < quality.intervals["bleu"][0] < expected < quality.intervals["bleu"][1]
    assert "nrefs:var" in quality.signature


def test_rouge_is_the_mean_over_texts_of_stems() -> None:
    quality = text_quality(["The cats sat.", "nothing alike"], ["the cat sat down", "other words"], "rouge")
    # Three of three words and of four, two of two pairs and of three, and three in a row; then nothing.
    assert quality.scores == pytest.approx({"rouge1": 100 * 6 / 14, "rouge2": 40, "rougeL": 100 * 6 / 14})
    assert quality.score == quality.scores["rougeL"]
    assert quality.signature == f"rouge-score rouge1+rouge2+rougeL|stem:porter|version:{version('rouge-score')}"
    assert text_quality(["b a"], [["c d", "a b"]], "rouge").scores == pytest.approx(
        {"rouge1": 100, "rouge2": 0, "rougeL": 50}
    )


def test_the_change_from_other_texts_is_paired() -> None:
    texts = [f"the {noun} sat on a mat of its own" for noun in ("cat", "dog", "cow", "hen", "pig", "owl")]
    references = [text.replace("mat", "rug") if place % 2 else f"a {text}" for place, text in enumerate(texts)]
    same = text_quality(texts, references, against=list(texts))
    assert (same.change, same.change_interval) == (0, (0, 0))
    assert (
        same.intervals["bleu"][1] - same.intervals["bleu"][0] > 5
    )  # nothing of which is left: both sides are drawn alike
    better = text_quality(references, references, against=texts)
    assert better.change == pytest.approx(100 - same.score)
    assert 0 < better.change_interval[0] < better.change < better.change_interval[1]
    assert (text_quality(texts, references).change, better.intervals["bleu"]) == (0, pytest.approx((100, 100)))


@pytest.mark.parametrize(
    ("texts", "references", "more", "message"),
    [
        ([], [], {}, "texts: 0 texts for 0 references"),
        (["a"], ["a", "b"], {}, "texts: 1 texts for 2 references; give one for each"),
        ("ab", ["a", "b"], {}, "texts: 2 texts for 2 references"),
        (["a", None], ["a", "b"], {}, r"texts\[1\] is None"),
        (["a"], [[]], {}, r"texts\[0\] is 'a' with references \(\); give strings"),
        (["a"], [[1]], {}, r"references \(1,\); give strings"),
        (["a"], ["a"], {"against": ["a", "b"]}, "against: 2 texts for 1 references"),
        (["a"], ["a"], {"measure": "meteor"}, "measure must be one of 'bleu', 'rouge', got 'meteor'"),
    ],
)
def test_what_cannot_be_compared_is_refused(texts: Any, references: Any, more: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        text_quality(texts, references, **more)


@pytest.mark.parametrize(("measure", "library"), [("bleu", "sacrebleu"), ("rouge", "rouge_score")])
def test_without_the_library_the_error_says_what_to_install(
    measure: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(TextQualityError, match=rf'needs the library "{library.replace("_", "-")}": {INSTALL}'):
        text_quality(["a"], ["a"], measure)


# Live judgements


@pytest.fixture(scope="module")
def chosen(make_model: Callable[..., Any], make_noisy: Callable[..., Any]) -> Workload:
    """A workload with the texts of plain decoding as references."""
    target = make_model("llama", vocabulary=300)
    pair = Pair(target, make_noisy(target, 0.3), train_tokenizer([words(500)], 300))
    prompts, plain = ("six", "seven eight", "nine ten"), AutoregressiveDecoder(pair)
    texts = tuple((plain.generate(prompt, max_new_tokens=TOKENS).text or "",) for prompt in prompts)
    return Workload(pair, PromptSet("own", ("one",), prompts, "here", "CC0-1.0", test_references=texts))


def judged(named: Workload, **more: Any) -> dict[str, Row]:
    decoder = ThresholdDecoder(named.load(), 4, "never")
    company = [Contender("exact", decoder, EXACT), Contender(LEARNED, decoder, STRAYING)]
    rows = judge_live(named, company, PROFILE, RewardSettings(), max_new_tokens=TOKENS, **more)
    return {row.method: row for row in rows}


def test_exact_texts_score_as_plain_ones_and_straying_ones_less(chosen: Workload) -> None:
    rows = judged(chosen)
    plain, learned = rows[PLAIN], rows[LEARNED]
    assert plain.values["bleu"] == pytest.approx(100)
    assert rows["exact"].values["bleu"] == plain.values["bleu"]
    assert (rows["exact"].values["bleu_change"], rows["exact"].intervals["bleu_change"]) == (0, (0, 0))
    assert learned.values["divergence"] > 0
    assert learned.values["bleu"] < 90
    assert learned.values["bleu_change"] == learned.values["bleu"] - plain.values["bleu"]
    low, high = learned.intervals["bleu_change"]
    assert low <= learned.values["bleu_change"] <= high
    decoder, prompts = ThresholdDecoder(chosen.load(), 4, "never"), chosen.prompt_ids("test")
    texts = [decoder.generate(prompt, max_new_tokens=TOKENS, knobs=STRAYING).text or "" for prompt in prompts]
    assert isinstance(chosen.prompts, PromptSet)
    assert learned.values["bleu"] == text_quality(texts, chosen.prompts.test_references).score

    paying = replace(learned, values={**learned.values, "wall_speedup": 2.0})  # whatever the clock says
    said = live_verdict([plain, replace(rows["exact"], method="default"), paying])
    assert f"; divergence {learned.values['divergence']:.3f}, BLEU {learned.values['bleu_change']:+.1f}\n" in said
    table = ResultTable(list(rows.values()), *live_columns(list(rows.values()))[:1], hardware={"name": "made up"})
    assert [column.heading for column in table.columns][-2:] == ["BLEU", "change"]
    assert "perplexity" not in [column.name for column in table.columns]
    assert "perplexity" in learned.values
    stored = ResultTable.from_json(table.to_json())
    assert list(stored.rows) == list(table.rows)
    (sentence,) = scored_texts(stored.rows)
    assert sentence.startswith("BLEU is that of 3 texts (3 of plain decoding's end after 9 tokens, unfinished): sacre")


def test_summaries_are_scored_by_rouge_and_every_pass_counts(chosen: Workload) -> None:
    texts = PromptSet(
        "own", ("one",), ("six", "seven"), "here", "CC0-1.0", test_references=(("a",), ("b",)), measure="rouge"
    )
    row = judged(replace(chosen, prompts=texts, sampling=Sampling(temperature=1.0)))[LEARNED]
    assert set(row.values) >= {"rouge1", "rouge2", "rougeL", "rougeL_change"}
    assert "ROUGE-L is that of 4 texts" in row.scored  # of two prompts with two seeds
    means = mean_rows([row, Row("else", LEARNED, values={"speedup": 1.0})])
    assert means[0].values["rougeL"] == row.values["rougeL"]


def test_without_references_or_without_being_asked_nothing_is_scored(
    chosen: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert isinstance(chosen.prompts, PromptSet)
    bare = replace(chosen, prompts=replace(chosen.prompts, test_references=()))
    for rows in (judged(bare, prompts=1), judged(chosen, prompts=1, score_texts=False)):
        assert not any("bleu" in row.values or row.scored for row in rows.values())
        assert "perplexity" in [column.name for column in live_columns(list(rows.values()))[0]]


def test_a_missing_library_is_told_before_any_text_is_decoded(
    chosen: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, shown: Callable[[], str]
) -> None:
    def decoding(*args: Any, **options: Any) -> Any:
        raise AssertionError("it decodes")

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(live, "decode_repeatedly", decoding)
    monkeypatch.setattr(Workload, "load", decoding)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextQualityError, match=rf"the prompts of .*own have references: BLEU needs .*{INSTALL}"):
        judge_live(chosen, [Contender(LEARNED, None)], PROFILE, RewardSettings())
    train = ["--workloads", "translator/interface", "--environment.backend", "live"]
    assert train_command(train) == 2
    assert '"specgym[quality]", or leave that out with --evaluation.no-score-texts' in shown()
    assert evaluate_command(["--pair", "translator", "--prompts", "interface", "--live"]) == 2
    assert "the prompts of translator/interface have references: BLEU needs" in shown()
    assert not list(tmp_path.iterdir())
