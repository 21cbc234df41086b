"""The checks of arguments: one number of any library, and messages that name what was given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from specgym.decoding import (
    LARGEST_SEED,
    ArgumentError,
    KnobError,
    check_fields,
    mapping_of,
    number,
    one_of,
    seed_number,
    sequence_of,
    whole_number,
)

NO_NUMBERS = [
    None,
    "3",
    b"3",
    [3],
    {3: 3},
    True,
    np.bool_(True),
    torch.tensor(True),
    np.array([3]),
    torch.tensor([3, 4]),
    3 + 0j,
    math.nan,
    math.inf,
    -math.inf,
    np.float32("nan"),
    10**400,
    10**5000,
    object(),
    int,
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(type(value).__name__))
def test_what_is_no_number_is_refused_by_name(value: Any) -> None:
    for check in (number, partial(whole_number, at_least=-5), seed_number):
        with pytest.raises(ArgumentError, match=r"^rate must be a (finite|whole) number.*, got .{1,80}$"):
            check("rate", value)


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.array(3.0), torch.tensor(3), Fraction(3)]
)
def test_one_number_of_any_library_becomes_pythons_own(value: Any) -> None:
    assert number("rate", value) == 3
    assert type(number("rate", value)) in (int, float)
    assert type(whole_number("rate", value)) is int


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: number("rate", 0, above=0, at_most=1), "rate must be a number above 0 and at most 1, got 0"),
        (lambda: number("rate", 1.0, at_least=0.5, below=1), "of at least 0.5 and below 1, got 1.0"),
        (lambda: number("rate", np.float32(-1), at_least=0, hint="or None"), "at least 0, got -1.0; or None"),
        (lambda: whole_number("length", 2.5), "length must be a whole number of at least 1, got 2.5"),
        (lambda: whole_number("length", 33, at_most=32), "length must be a whole number from 1 to 32"),
        (lambda: whole_number("length", 2**63), "from 1 to 9223372036854775807, got 92233"),
        (lambda: seed_number("seed", 2**32), f"from 0 to {LARGEST_SEED}, got 4294967296"),
        (lambda: whole_number("length", np.arange(3)), r"got ndarray of shape \(3,\)"),
        (lambda: whole_number("length", "many\nmore" * 99), r"got 'many\\nmore.*\.\.\.$"),
        (lambda: one_of("start", "best", ("random", None)), "start must be one of 'random', None, got 'best'"),
        (lambda: one_of("start", True, (1, 2)), "start must be one of 1, 2, got True"),
        (lambda: one_of("start", np.arange(3), ("random",)), "start must be one of 'random', got ndarray"),
        (lambda: sequence_of("contexts", 3, whole_number), "contexts must be a sequence of values, got 3"),
        (lambda: sequence_of("contexts", "33", whole_number), "contexts must be a sequence of values, got '33'"),
        (lambda: sequence_of("contexts", torch.tensor(3), whole_number), "contexts must be a sequence of values"),
        (lambda: sequence_of("contexts", [1, 0], whole_number), "each of contexts must be a whole number of at least"),
        (lambda: sequence_of("contexts", [], whole_number), "contexts must have at least 1 value, got 0"),
        (lambda: sequence_of("contexts", [1, 2, 1], whole_number, distinct=True), "contexts has 1 twice"),
        (lambda: mapping_of("knobs", [("a", 1)]), r"knobs must be a mapping of names to values, got \[\('a', 1\)\]"),
    ],
)
def test_messages_say_what_is_allowed(check: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        check()


def test_sequences_may_be_arrays_and_mappings_may_be_left_out() -> None:
    assert sequence_of("contexts", np.array([3, 4]), whole_number) == (3, 4)
    assert sequence_of("contexts", (), whole_number, fewest=0) == ()
    assert mapping_of("knobs", None) == {}
    assert one_of("start", np.str_("random"), ("random", None)) == "random"


@dataclass(frozen=True)
class _Settings:
    tokens: int = 1
    rate: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self, partial(whole_number, error=KnobError), "tokens")
        check_fields(self, number, "rate")


def test_fields_of_a_frozen_dataclass_are_kept_as_plain_numbers() -> None:
    settings = _Settings(np.int64(7), torch.tensor(0.25))  # type: ignore[arg-type]
    assert (settings.tokens, settings.rate) == (7, 0.25)
    assert (type(settings.tokens), type(settings.rate)) == (int, float)
    with pytest.raises(KnobError, match="tokens must be a whole number"):
        _Settings(tokens=0)
