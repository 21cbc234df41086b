"""The decoders that environments tune by name."""

from __future__ import annotations

from specgym.decoding import Pair
from specgym.envs.decoders import DECODERS, build_decoder, default_workload, rounds_of


def test_a_decoders_kind_of_rounds_and_workload_are_known_by_name(pair: Pair) -> None:
    for name in ("threshold", "speculative", "lookahead"):
        decoder = build_decoder(name, pair, 4)
        assert decoder.knobs == DECODERS[name].knobs(4)
        assert rounds_of(name) == rounds_of(decoder) == rounds_of(type(decoder))
    assert (rounds_of("lookahead"), rounds_of("threshold")) == ("lookahead", "chain")
    assert default_workload("lookahead") == "tiny-10m/prose"
