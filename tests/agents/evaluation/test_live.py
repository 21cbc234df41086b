"""Live decoding in turns: its numbers, their intervals, and that the charged ones repeat."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from specgym.agents import Contender, ResultTable, Row, contenders, judge_live
from specgym.agents.evaluation import live
from specgym.agents.evaluation.contenders import DO_NOT_SPECULATE, FIXED, ONE_FOR_ALL, STOP_RULE, live_verdict
from specgym.agents.evaluation.live import CHARGED, live_columns, log_likelihood
from specgym.agents.evaluation.results import ALL, LEARNED, PLAIN, SAME, kept_bound, mean_rows
from specgym.agents.training.run_folder import RunFileError
from specgym.decoding import LatencyProfile, ThresholdDecoder
from specgym.decoding.models.encoder.encoder_decoder import EncoderDecoder
from specgym.envs import RewardSettings, workload
from tests.helpers.encoder_decoders import SOURCE, encoder_decoder
from tests.helpers.table_models import TableModel, random_table

PROFILE = LatencyProfile("pair", {0: 0.0, 16: 0.016}, {1: 0.010, 17: 0.014}, 0.010, {"name": "made up"})
EXACT = {"fallback": 0.0, "rollback": 1.0}
STRAYING = {"fallback": 0.9, "rollback": 1.0}
METHODS = (PLAIN, FIXED, STOP_RULE, "default", ONE_FOR_ALL, LEARNED)


def judged(workloads: tuple[str, str], tokens: int = 12) -> ResultTable:
    rows: list[Row] = []
    for name in workloads:
        chosen = workload(name)
        decoder = ThresholdDecoder(chosen.load())
        company = contenders(decoder, STRAYING, exact_length=2, exact_knobs=EXACT, one_for_all={"fallback": 0.25})
        rows += judge_live(chosen, company, PROFILE, RewardSettings(), prompts=3, max_new_tokens=tokens)
    rows += mean_rows(rows)
    columns, caption = live_columns(rows)
    return ResultTable(rows, columns, CHARGED, live_verdict(rows, "thresholds"), caption, {"name": "made up"})


@pytest.fixture(scope="module")
def table(small_workloads: tuple[str, str]) -> ResultTable:
    return judged(small_workloads)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sides and passes of every call that decodes."""
    calls = []
    decode = live.decode_repeatedly

    def counted(sides: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        calls.append((len(sides), len(options["seeds"])))
        return decode(sides, *args, **options)

    monkeypatch.setattr(live, "decode_repeatedly", counted)
    return calls


def test_every_method_on_every_workload_and_their_means(table: ResultTable, small_workloads: tuple[str, str]) -> None:
    rows = table.rows
    assert [row.method for row in rows] == list(METHODS) * 3
    assert [row.workload for row in rows[::6]] == [*small_workloads, ALL]
    for row in rows:
        if row.method == PLAIN:
            assert row.values["ms_per_token"] == pytest.approx(10.0)
            assert row.values["speedup"] == pytest.approx(1.0)
            assert row.values["mean_acceptance_length"] == 1
            assert row.values["wall_speedup"] == pytest.approx(1.0)
            assert row.values["divergence"] == 0
        assert row.values["wall_ms_per_token"] > 0
        for column, (low, high) in row.intervals.items():
            assert low <= row.values[column] + 1e-9
            assert row.values[column] <= high + 1e-9
    greedy, sampled, means = (dict(zip(METHODS, rows[place : place + 6], strict=True)) for place in (0, 6, 12))
    mean = (greedy[LEARNED].values["reward"] + sampled[LEARNED].values["reward"]) / 2
    assert means[LEARNED].values["reward"] == pytest.approx(mean)
    assert greedy["default"].knobs == {knob.name: knob.default for knob in ThresholdDecoder.knobs_without_pair()}
    assert greedy[LEARNED].knobs == STRAYING
    assert greedy[ONE_FOR_ALL].knobs == {"fallback": 0.25, "rollback": 1.0}
    assert (greedy[FIXED].knobs, greedy[FIXED].rule) == ({}, "length 2")
    assert greedy[LEARNED].values["draft_acceptance_rate"] > greedy["default"].values["draft_acceptance_rate"]


def test_exact_texts_are_the_target_s_own_and_as_likely(table: ResultTable) -> None:
    greedy = dict(zip(METHODS, table.rows[:6], strict=True))
    for method in (PLAIN, FIXED, STOP_RULE):
        assert greedy[method].values["equal_texts"] == 1
        assert greedy[method].values["perplexity"] == pytest.approx(greedy[PLAIN].values["perplexity"])
    assert greedy[LEARNED].values["equal_texts"] < 1
    assert not any("equal_texts" in row.values for row in table.rows[6:12])  # sampled texts differ anyway
    assert table.rows[12].values["equal_texts"] == 1  # so the mean is that of the greedy ones


def test_perplexity_and_equal_texts_are_those_of_the_emitted_tokens(small_workloads: tuple[str, str]) -> None:
    chosen = workload(small_workloads[0])
    pair, prompts = chosen.load(), chosen.prompt_ids("test")[:2]
    decoder = ThresholdDecoder(pair)
    (plain, learned) = judge_live(
        chosen, [Contender(LEARNED, decoder, STRAYING)], PROFILE, RewardSettings(), prompts=2, max_new_tokens=12
    )
    losses, equal = [], []
    for prompt in prompts:
        text = decoder.generate(prompt, max_new_tokens=12, seed=0, knobs=STRAYING).tokens
        equal.append(text == decoder.generate(prompt, max_new_tokens=12, seed=0, knobs=EXACT).tokens)
        with torch.inference_mode():
            logits = pair.target.model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(text), reduction="none").tolist()
    assert learned.values["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert learned.values["equal_texts"] == np.mean(equal)
    assert plain.values["perplexity"] != pytest.approx(learned.values["perplexity"])


def test_a_text_s_likelihood_is_that_of_its_tokens_after_the_prompt() -> None:
    scores = random_table(5, seed=0)
    target = TableModel(scores)
    by_hand = sum(float(scores[before, last].log_softmax(-1)[token]) for before, last, token in ((3, 1, 4), (1, 4, 0)))
    assert log_likelihood(target, [2, 3, 1], [4, 0]) == pytest.approx(by_hand)
    assert target.length == 0


def test_a_text_of_a_model_with_an_encoder_is_as_likely_as_the_model_says() -> None:
    target, text = EncoderDecoder(encoder_decoder("t5")), [9, 4, 11]
    with torch.inference_mode():
        logits = target.model(
            input_ids=torch.tensor([SOURCE]), decoder_input_ids=torch.tensor([[0, *text[:-1]]])
        ).logits
    expected = -torch.nn.functional.cross_entropy(logits[0], torch.tensor(text), reduction="sum")
    assert log_likelihood(target, SOURCE, text) == pytest.approx(float(expected), rel=1e-5)


def test_contenders_that_decode_alike_are_decoded_once(
    small_workloads: tuple[str, str], decoded: list[tuple[int, int]]
) -> None:
    chosen = workload(small_workloads[0])
    company = contenders(ThresholdDecoder(chosen.load()), EXACT, exact_knobs=EXACT, one_for_all=EXACT)
    rows = judge_live(chosen, company, PROFILE, RewardSettings(), prompts=2, max_new_tokens=8)
    assert decoded == [(3, 1)]  # plain, default, and one for the other three
    of = {row.method: row for row in rows}
    assert of[LEARNED].values == of[STOP_RULE].values == of[ONE_FOR_ALL].values
    assert of[LEARNED].intervals == of[STOP_RULE].intervals


@pytest.mark.parametrize(("rollback", "place", "passes"), [(2.0, 0, 1), (1.5, 0, 2), (2.0, 1, 2)])
def test_texts_are_decoded_again_only_where_something_is_drawn(
    rollback: float, place: int, passes: int, small_workloads: tuple[str, str], decoded: list[tuple[int, int]]
) -> None:
    chosen = workload(small_workloads[place])
    company = contenders(ThresholdDecoder(chosen.load()), {"fallback": 0.37, "rollback": rollback})
    judge_live(chosen, company, PROFILE, RewardSettings(), prompts=1, max_new_tokens=4)
    assert decoded == [(3, passes)]


def test_contenders_are_told_what_rounds_cost(
    small_workloads: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles: list[LatencyProfile] = []
    monkeypatch.setattr(ThresholdDecoder, "charge_by", lambda decoder, profile: profiles.append(profile))
    chosen = workload(small_workloads[0])
    company = contenders(ThresholdDecoder(chosen.load(), stop="never"), EXACT)
    judge_live(chosen, company, PROFILE, RewardSettings(), prompts=1, max_new_tokens=4)
    assert PROFILE in profiles


def test_where_the_advice_is_not_to_speculate_plain_decoding_is_measured(
    small_workloads: tuple[str, str], decoded: list[tuple[int, int]]
) -> None:
    chosen = workload(small_workloads[0])
    company = contenders(ThresholdDecoder(chosen.load()), None)
    plain, _, learned = judge_live(chosen, company, PROFILE, RewardSettings(), prompts=1, max_new_tokens=4)
    assert decoded == [(2, 1)]
    assert (learned.method, learned.knobs, learned.rule) == (LEARNED, {}, DO_NOT_SPECULATE)
    assert learned.values == plain.values
    console = Console(width=100, record=True, file=io.StringIO())
    rows = [plain, Row(chosen.name, "default", {"fallback": 0.5, "rollback": 1.0}, plain.values), learned]
    console.print(ResultTable(rows, live_columns(rows)[0]).render("Held-out prompts"))
    lines = [line.split() for line in console.export_text().splitlines()]
    (place,) = (place for place, line in enumerate(lines) if line[:1] == [LEARNED])
    assert (lines[place][1:3], lines[place + 1]) == (["do", "not"], ["speculate"])


def test_measured_again_the_charged_columns_are_reproduced(
    table: ResultTable, small_workloads: tuple[str, str], tmp_path: Path
) -> None:
    again = judged(small_workloads)
    for before, after in zip(table.rows, again.rows, strict=True):
        charged = [name for name in CHARGED if name in before.values]
        assert {name: after.values[name] for name in charged} == pytest.approx(
            {name: before.values[name] for name in charged}, rel=SAME
        )
    table.save(tmp_path / "table.json", "python train.py")
    stored = ResultTable.load(tmp_path / "table.json")
    assert again.differences(stored) == []
    assert any("speedup was" in line for line in judged(small_workloads, tokens=13).differences(stored))


@pytest.mark.parametrize(("factor", "reported"), [(1 + 1e-8, False), (1 + 1e-4, True)])
def test_only_what_rounding_cannot_explain_counts_as_a_difference(
    table: ResultTable, factor: float, reported: bool
) -> None:
    rows = [replace(row, values={**row.values, "speedup": factor * row.values["speedup"]}) for row in table.rows]
    assert bool(replace(table, rows=rows).differences(table)) == reported


def test_the_stored_table_has_its_command_hardware_notes_and_rows(table: ResultTable, tmp_path: Path) -> None:
    replace(table, notes=("At most 1.2 GiB.",)).save(tmp_path / "table.json", "python train.py --seed 1")
    stored = ResultTable.load(tmp_path / "table.json")
    assert (stored.command, stored.hardware, stored.verdict, stored.notes) == (
        "python train.py --seed 1",
        table.hardware,
        table.verdict,
        ("At most 1.2 GiB.",),
    )
    assert list(stored.rows) == list(table.rows)
    assert tuple(stored.compared) == CHARGED
    lines = stored.to_csv().splitlines()
    assert len(lines) == 1 + len(table.rows)
    assert lines[0].startswith("workload,method,ms_per_token")
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(RunFileError, match=r"table\.json does not hold a table"):
        ResultTable.load(tmp_path / "table.json")


def test_a_table_of_an_earlier_version_has_plain_decoding_under_its_present_name(
    table: ResultTable, tmp_path: Path
) -> None:
    content = {**table.to_json(), "format": "specgym-table-1"}
    for row in content["rows"]:
        row["method"] = row["method"].replace(PLAIN, "autoregressive")
    (tmp_path / "table.json").write_text(json.dumps(content))
    assert list(ResultTable.load(tmp_path / "table.json").rows) == list(table.rows)


def test_the_table_shows_every_method_and_fits_in_a_hundred_characters(table: ResultTable) -> None:
    wide = [replace(row, workload="smollm2-ngram/code@1.0") for row in table.rows[:6]]
    wide = [replace(row, values={**row.values, "ms_per_token": 123.45, "perplexity": 23.45}) for row in wide]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(replace(table, rows=wide, notes=("At most 1.2 GiB.",)).render("Held-out prompts"))
    text = console.export_text()
    (learned,) = (line.split() for line in text.splitlines() if line.split()[:1] == [LEARNED])
    assert learned[1:4] == ["0.90,", "1.00", "123.45"]
    assert len(learned) == 12
    assert "exact, stop rule" in text
    assert "length 2" in text
    assert "At most 1.2 GiB." in " ".join(text.split())
    assert "…" not in text


def test_the_table_names_the_decoder_s_knobs_and_what_it_reads() -> None:
    values = dict.fromkeys((*CHARGED[:7], "wall_ms_per_token", "wall_speedup"), 2.0) | {"divergence": 0.0}
    rows = [
        Row("a/prose", method, knobs, values | {"target_tokens_per_token": 12.5})
        for method, knobs in (("default", {"window": 5, "guesses": 7}), (LEARNED, {"window": 2, "guesses": 11}))
    ]
    console = Console(width=110, record=True, file=io.StringIO())
    columns, caption = live_columns(rows)
    console.print(ResultTable(rows, columns, caption=caption).render("Held-out prompts"))
    text = console.export_text()
    assert "2, 11" in text
    assert "tokens read" in text
    assert "12.50" in text
    assert "diver-" not in text
    assert "learned such, 2.00 x plain (clock 2.00), 1.00 x the defaults\n" in live_verdict(rows, "such")


def test_the_verdict_says_on_which_workloads_a_bound_is_broken(table: ResultTable) -> None:
    divergences = {row.workload: row.values["divergence"] for row in table.rows if row.method == LEARNED}
    strayed = [name for name, value in divergences.items() if value > 0 and name != ALL]
    assert strayed
    text = kept_bound(table.rows, 0.0)
    assert f"kept on the held-out prompts of {len(divergences) - 1 - len(strayed)} of {len(divergences) - 1}" in text
    assert all(name in text for name in strayed)
    assert "kept on the held-out prompts of 2 of 2 workloads." in live_verdict(table.rows, max_divergence=1.0)
