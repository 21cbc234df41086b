"""Registry of decoders: built-in ones, entry points, registration, and imports without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import gymnasium
import pytest
import torch
from transformers import PreTrainedModel

import specgym
from specgym.decoding import (
    GREEDY,
    AutoregressiveDecoder,
    CostProbe,
    Decoder,
    DecoderRegistryError,
    DecoderTraits,
    Knob,
    LatencyProfile,
    Pair,
    Round,
    Session,
    build_decoder,
    decoder_class,
    decoder_names,
    environment_names,
    measure,
    measured,
    register,
    registry,
    traits_of,
)
from tests.helpers.warm_python import WarmPython

ROOT = Path(__file__).resolve().parents[2]
BUILT_IN = ("threshold", "speculative", "lookahead", "medusa", "medusa-typical", "draft-tree", "pipelined")


class RepeatSession(Session["RepeatDecoder"]):
    """One prompt whose rounds read the last token several times, as a cost, and emit the target's own."""

    def _round(self, knobs: Mapping[str, float]) -> Round:
        drafted = int(knobs["copies"])
        last = self.context[-1]
        scores = self.target.forward(torch.tensor([last] * (drafted + 1))).scores
        token = int(scores[0].argmax())
        self.target.truncate(len(self.context))
        self._emit([token])
        return Round((token,), drafted, 0, 0.0, 0.0, 0.001, draft_steps=0, target_tokens=drafted + 1)


class RepeatDecoder(Decoder[RepeatSession]):
    """A decoder from outside: one file, one knob, no draft."""

    name = "repeat-last"
    lossless = True
    needs_draft = False
    session_class = RepeatSession
    knobs = (Knob("copies", 1, 4, 2, True, "tokens proposed a round"),)


@pytest.fixture
def alone(make_model: Callable[..., PreTrainedModel]) -> Pair:
    return Pair(make_model("llama", layers=1, vocabulary=64, hidden=16, context=256), name="alone")


@pytest.fixture
def _clean() -> Iterator[None]:
    """Leave the registries as they were."""
    entries, specs = dict(registry._registered()), set(gymnasium.registry)
    yield
    registry._entries.clear()
    registry._entries.update(entries)
    for name in set(gymnasium.registry) - specs:
        del gymnasium.registry[name]


def test_the_built_in_decoders_are_known_by_name_and_their_traits_agree_with_their_classes() -> None:
    assert decoder_names()[: len(BUILT_IN)] == BUILT_IN
    assert [environment_names()[name] for name in BUILT_IN] == [
        "Thresholds", "Speculative", "Lookahead", "Medusa", "MedusaTypical", "DraftTree", "Pipeline",
    ]  # fmt: skip
    for name in BUILT_IN:
        traits, kind = traits_of(name), decoder_class(name)
        assert issubclass(kind, traits)
        assert issubclass(kind, Decoder)
        assert (kind.name, kind.env_name) == (name, environment_names()[name])
        assert kind.knobs_without_pair() == traits.knobs_without_pair()
        for values in traits.presets.values():
            assert set(values) <= {knob.name for knob in traits.knobs_without_pair()}


def test_a_decoder_is_built_by_name_with_its_options_or_by_a_callable(alone: Pair) -> None:
    decoder = build_decoder("lookahead", alone, max_window=4)
    assert decoder.knobs == traits_of("lookahead").knobs_without_pair(max_window=4)
    assert build_decoder(lambda pair: decoder, alone) is decoder
    with pytest.raises(ValueError, match="lookahead has no option 'max_draft_length'; it has: max_window, max_ngram"):
        build_decoder("lookahead", alone, max_draft_length=4)
    with pytest.raises(DecoderRegistryError, match=r"no decoder 'tree'; there are: threshold, .*specgym\.register"):
        build_decoder("tree", alone)
    with pytest.raises(DecoderRegistryError, match="AutoregressiveDecoder has no knobs"):
        build_decoder(AutoregressiveDecoder, alone)
    with pytest.raises(ValueError, match="ThresholdDecoder needs a draft, and pair alone has none"):
        build_decoder("threshold", alone)


@pytest.mark.usefixtures("_clean")
def test_a_registered_decoder_has_a_name_and_an_environment() -> None:
    specgym.register(RepeatDecoder)
    assert decoder_class("repeat-last") is traits_of("repeat-last") is RepeatDecoder
    assert gymnasium.registry["specgym/RepeatLast-v0"].kwargs == {"decoder": "repeat-last"}
    specgym.register(RepeatDecoder)  # again, as a notebook does


@pytest.mark.usefixtures("_clean")
def test_what_cannot_be_registered_is_refused_with_the_way_out() -> None:
    class Knobless(RepeatDecoder):
        name = "knobless"
        knobs = ()  # type: ignore[assignment]  # the mistake

    class Nameless(Decoder[RepeatSession]):
        lossless = True

    class Taken(RepeatDecoder):
        name = "lookahead"

    for kind, message in (
        (Knobless, "Knobless has no knobs"),
        (Nameless, "Nameless has no attribute 'name'"),
        (
            Taken,
            "'lookahead' .* is registered already, by specgym.decoding.*:LookaheadDecoder",
        ),
        (int, "is no decoder: give a subclass of specgym.decoding.Decoder"),
        ("nowhere:Decoder", "'nowhere:Decoder' cannot be imported"),
    ):
        with pytest.raises(DecoderRegistryError, match=message):
            register(kind)  # type: ignore[arg-type]  # that is what is tested


def test_names_become_environment_names_and_options_are_checked() -> None:
    class Odd(DecoderTraits):
        name = "three-word-name"

    assert Odd.env_name == "ThreeWordName"
    assert Odd.cost_kind(greedy=True) == "chain"
    assert RepeatDecoder.cost_kind(greedy=False) == "repeat-last"
    with pytest.raises(ValueError, match="repeat-last has no option 'size'; it has: none"):
        RepeatDecoder.knobs_without_pair(size=3)


def test_a_decoder_from_outside_is_timed_by_whole_rounds_and_charged_by_what_it_read(
    alone: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECGYM_CACHE", str(tmp_path))
    decoder = RepeatDecoder(alone)
    profile = measured(alone, decoder)
    assert (profile.kind, profile.draft_seconds) == ("repeat-last", {0: 0.0})
    assert list(profile.target_seconds) == [2, 3, 5]  # its knob at its ends and at its default
    generation = decoder.generate([1, 2, 3], max_new_tokens=6)
    assert generation.tokens == AutoregressiveDecoder(alone).generate([1, 2, 3], max_new_tokens=6).tokens
    assert profile.charge(generation.rounds) == pytest.approx(6 * profile.target(3))
    (file,) = (tmp_path / "latency").iterdir()
    assert "repeat-last-copies_1_4-greedy" in file.name
    assert LatencyProfile.load(file) == profile


def test_rounds_that_overlap_take_the_longer_of_their_two_times(alone: Pair, tmp_path: Path) -> None:
    class Overlapping(RepeatDecoder):
        def cost_probe(self, max_target_tokens: int | None = None) -> CostProbe:
            return CostProbe(self, sizes=[2, 3], knobs_for=lambda size: {"copies": size - 1}, overlaps=True)

    assert measure(alone, Overlapping(alone), repeats=1, sampling=GREEDY).overlaps
    profile = LatencyProfile("t", {0: 0.0, 4: 4.0}, {1: 2.0, 5: 3.0}, 1.0, {}, kind="mine", overlaps=True)
    rounds = [Round((1,), 4, 0, 0.0, 0.0, 0.0), Round((1,), 0, 0, 0.0, 0.0, 0.0)]
    assert profile.charge(rounds) == 4.0 + 1.0  # drafting is the longer; nobody drafts beside the second, a plain step
    assert profile.round(4) == 4.0
    steps, read = torch.tensor([4, 0]).numpy(), torch.tensor([5, 1]).numpy()
    assert profile.rounds_of(steps, read).tolist() == [4.0, 1.0]
    profile.save(tmp_path / "profile.json")
    assert LatencyProfile.load(tmp_path / "profile.json") == profile


def test_entry_points_of_other_packages_are_found_and_imported_only_when_they_are_needed(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    (tmp_path / "their_package.py").write_text(
        dedent(
            '''
            """Another package's decoder."""
            from specgym.decoding import Decoder, Knob, Session

            class TheirDecoder(Decoder[Session]):
                name = "their-own"
                lossless = True
                needs_draft = False
                knobs = (Knob("size", 1, 8, 2, True),)
            '''
        )
    )
    folder = tmp_path / "their_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[specgym.decoders]\ntheir-own = their_package:TheirDecoder\n")
    script = f"""
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
        import gymnasium, specgym
        from specgym.decoding import decoder_class, decoder_names, traits_of
        assert "their-own" in decoder_names(), decoder_names()
        assert "specgym/TheirOwn-v0" in gymnasium.registry
        assert "their_package" not in sys.modules
        assert traits_of("their-own").knobs_without_pair()[0].name == "size"
        assert decoder_class("their-own").__name__ == "TheirDecoder"
    """
    ended = warm_python.run("-c", dedent(script), environment=os.environ)
    assert ended.returncode == 0, ended.output


def test_what_a_replay_needs_is_imported_without_torch_and_transformers() -> None:
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import specgym
        from specgym.decoding import GREEDY, LatencyProfile, PromptSet, Sampling, decoder_names, resolve, traits_of
        import specgym.decoding.errors, specgym.decoding.files, specgym.decoding.latency.probe
        for name in decoder_names():
            assert traits_of(name).knobs_without_pair()
            traits_of(name).cost_kind(True)
        heavy = sorted({{"torch", "transformers"}} & set(sys.modules))
        assert not heavy, heavy
    """
    outcome: Any = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
