"""Engines in an interpreter of their own: answers, errors and ends come through the pipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from specgym.decoding import EngineError, EngineOptions, EngineText, Knob, KnobError
from specgym.decoding.engines.pipe import PipeEngine, PipeWorker
from specgym.decoding.errors import ArgumentError

_TOY = """
import os, sys, time
class Worker:
    def load(self, target):
        return {"version": "1.2"} if target == "there" else {"refused": "there is no " + target}
    def generate(self, prompt, settings, max_new_tokens, temperature, seed):
        print("chatter")
        os.system("echo chatter from below")
        if prompt == "fail":
            raise KeyError("a layer") from OSError("a disk is full")
        if prompt == "die":
            print("out of tokens", file=sys.stderr)
            os._exit(7)
        if prompt == "sleep":
            time.sleep(600)
        return {"text": repr((prompt, settings)), "tokens": [1], "new_tokens": max_new_tokens, "seconds": 1.0}
"""


class Toy(PipeEngine):
    """An engine whose worker is a few lines of Python."""

    name = "toy"
    package = "toy 1.2"
    module = "toy_worker"
    installed_as = "toys"
    length_knob = "length"
    knobs = (Knob("length", 0, 9, 4, integer=True), Knob("threshold", 0, 1, 0.5))

    def models(self) -> Mapping[str, Any]:
        return {"target": self.target}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_worker.py").write_text(_TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.fixture(scope="module")
def toy(path: None) -> Iterator[Toy]:
    with Toy("there", "draft") as engine:
        yield engine


def test_settings_reach_the_worker_and_chatter_does_not_reach_us(toy: Toy) -> None:
    assert toy.version() == "1.2"
    plain, drafting, none = toy.serve(None), toy.serve({"length": 3}), toy.serve({"length": 0})
    assert drafting.generate("größe", 8).text == repr(("größe", {"length": 3, "threshold": 0.5}))
    assert drafting.generate([5, 6], 8).text == repr(([5, 6], {"length": 3, "threshold": 0.5}))
    for served in (plain, none):
        assert served.generate("x", 8) == EngineText(repr(("x", None)), [1], 8, 1.0)


def test_what_is_out_of_range_is_refused_before_it_is_sent(toy: Toy) -> None:
    with pytest.raises(KnobError, match="knob length must be a whole number from 0 to 9"):
        toy.serve({"length": 10})
    with pytest.raises(KnobError, match="toy has no knob 'lenght'"):
        toy.serve({"lenght": 3})
    served = toy.serve(None)
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        served.generate("x", 0)
    with pytest.raises(ArgumentError, match="temperature"):
        served.generate("x", 1, temperature=-1.0)


def test_a_failed_request_leaves_the_worker_at_work(toy: Toy) -> None:
    served = toy.serve(None)
    with pytest.raises(EngineError, match=r"toy failed\. KeyError: 'a layer' \(OSError: a disk is full\)"):
        served.generate("fail", 8)
    assert served.generate("x", 8).new_tokens == 8


def test_a_worker_that_dies_leaves_its_last_words_and_another_is_started(path: None) -> None:
    with Toy("there", "draft") as toy:
        served = toy.serve(None)
        for _ in range(2):
            with pytest.raises(EngineError, match=r"(?s)toy has ended with exit code 7.*out of tokens"):
                served.generate("die", 8)
        assert toy.serve(None).generate("x", 8).new_tokens == 8


def test_a_worker_that_takes_too_long_is_stopped(path: None) -> None:
    worker = PipeWorker("toy", "toy_worker", EngineOptions(), "toys")
    arguments = {"settings": None, "max_new_tokens": 1, "temperature": 0.0, "seed": 0}
    with pytest.raises(EngineError, match=r"toy has not answered within 0\.1 seconds"):
        worker.ask("generate", 0.1, prompt="sleep", **arguments)
    with pytest.raises(EngineError, match="toy"):
        worker.ask("generate", prompt="x", **arguments)


def test_models_that_a_worker_refuses_are_the_callers_fault(path: None) -> None:
    with pytest.raises(ArgumentError, match="toy: there is no such"):
        Toy("such", None).serve(None)


def test_an_interpreter_without_the_engine_is_named_with_the_way_out(path: None, tmp_path: Path) -> None:
    class Absent(Toy):
        module = "absent_worker"

    with pytest.raises(EngineError, match=r"toy cannot be imported by .*absent_worker.* -m pip install toys`.*python"):
        Absent("there", None).version()
    nowhere = EngineOptions(python=tmp_path / "python")
    with pytest.raises(EngineError, match=r"(?s)toy has ended with exit code 127.*python cannot be run: No such file"):
        Toy("there", None, nowhere).version()


def test_an_address_and_a_program_are_refused() -> None:
    with pytest.raises(ArgumentError, match="toy is a Python package and has no address"):
        Toy("there", None, EngineOptions(address="http://localhost:1"))
    with pytest.raises(ArgumentError, match="toy is a Python package and has no program"):
        Toy("there", None, EngineOptions(program=Path("toy")))


def test_tokens_that_come_with_the_first_are_not_timed() -> None:
    timed = [EngineText("", None, 9, 1.0, first_tokens=tokens).timed_tokens for tokens in (1, 4, 9)]
    assert timed == [8, 5, 1]
