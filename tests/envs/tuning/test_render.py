import re

import pytest

from specgym.decoding.loading.pair import Pair
from specgym.decoding.rounds import Round
from specgym.envs.tuning.render import ACCEPTED, TAKEN_BACK, TARGET, render_rounds, render_step, to_ansi

ROUNDS = [Round((1, 2), 3, 1, 0.0, 0.0, 0.0, taken_back=(4, 5)), Round((3,), 0, 0, 0.0, 0.0, 0.0)]


def spans(text: object) -> list[tuple[str, str]]:
    from rich.text import Text

    assert isinstance(text, Text)
    return [(text.plain[span.start : span.end].strip(), str(span.style)) for span in text.spans]


def test_each_kind_of_token_has_its_colour(speaking_pair: Pair) -> None:
    result = spans(render_rounds(speaking_pair, [6], ROUNDS))
    assert result == [
        ("w6", "dim"),
        ("knock", ACCEPTED),
        ("w4 w5", TAKEN_BACK),
        ("seek", TARGET),
        ("find", TARGET),
    ]


def test_spaces_between_words_survive(speaking_pair: Pair) -> None:
    kept = [round_ for round_ in ROUNDS if not round_.taken_back]
    assert render_rounds(speaking_pair, [6, 7], kept).plain == "w6 w7 find"


def test_ids_are_shown_without_a_tokenizer(pair: Pair) -> None:
    assert render_rounds(pair, [6], ROUNDS).plain == "6 1 4 5 2 3 "


def test_marks_stand_in_for_colours(speaking_pair: Pair) -> None:
    assert "[- w4 w5-]" in render_rounds(speaking_pair, [6], ROUNDS, marks=True).plain


def test_a_step_shows_legend_knobs_and_metrics(pair: Pair) -> None:
    text = render_step(pair, [6], ROUNDS, title="toy", knobs={"fallback": 0.25}, metrics={"speedup": 1.5})
    for part in ("toy", "fallback=0.25", "draft, accepted", "taken back", "the target's own", "speedup=1.5"):
        assert part in text.plain


def test_before_the_first_step_nothing_is_decoded(pair: Pair) -> None:
    text = render_step(pair, [], [], title="toy", knobs={}, metrics={})
    assert "nothing decoded yet" in text.plain


def test_ansi_text_has_a_code_for_each_of_the_three_colours(pair: Pair) -> None:
    text = to_ansi(render_rounds(pair, [6], ROUNDS))
    assert {"32", "9;31", "1;34"} <= set(re.findall(r"\x1b\[([0-9;]+)m", text))


def test_a_models_text_cannot_steer_the_terminal(speaking_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pair, "decode", lambda self, tokens: "\x1b[2Jgone" if tokens else "")
    assert "\x1b" not in render_rounds(speaking_pair, [6], ROUNDS).plain


def test_a_long_prompt_shows_its_end(pair: Pair) -> None:
    text = render_rounds(pair, list(range(60)) * 4, []).plain
    assert text.startswith("…")
    assert text.endswith("58 59 ")
