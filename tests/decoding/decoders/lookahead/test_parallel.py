"""Lookahead decoding by several processes: shares of a pass, texts, and processes that part, stop or die."""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given

from specgym.decoding.decoders.lookahead.decoder import LookaheadDecoder
from specgym.decoding.decoders.lookahead.parallel import ParallelError, divided, torchrun_group
from specgym.decoding.decoders.lookahead.pool import PoolSettings
from specgym.decoding.decoders.lookahead.window import layout
from specgym.decoding.errors import ArgumentError
from specgym.decoding.loading.pair import Pair
from specgym.decoding.models.identity import sampled_digest
from specgym.decoding.models.linear_layers import PrepackedLinear
from specgym.decoding.rounds import Generation
from specgym.decoding.sampling import GREEDY, Sampling
from tests.helpers.random_models import random_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4]
WEIGHED = PoolSettings(min_acceptance=0.05, ranking="learned")
CASES: list[tuple[Sampling, tuple[int, int, int], PoolSettings]] = [
    (GREEDY, (5, 3, 5), PoolSettings()),
    (GREEDY, (7, 4, 4), WEIGHED),
    (GREEDY, (1, 5, 2), PoolSettings()),
    (GREEDY, (4, 2, 3), PoolSettings(seeds="nothing")),
    (GREEDY, (6, 3, 0), PoolSettings()),
    (Sampling(0.8), (5, 3, 5), PoolSettings()),
    (Sampling(0.5, top_p=0.9), (8, 4, 6), WEIGHED),
]
FOUR, TWO = range(0, 7, 2), range(1, 7, 2)
"""Cases for so many processes; both have texts of either kind."""


def decode(decoder: LookaheadDecoder, sampling: Sampling, shape: tuple[int, int, int], seed: int | None) -> Generation:
    knobs = dict(zip(("window", "ngram", "guesses"), shape, strict=True))
    return decoder.generate(PROMPT, max_new_tokens=18, sampling=sampling, seed=seed, knobs=knobs)


def by_cases(cases: range, pair: Pair, group: Any = None) -> list[tuple[list[int], int]]:
    """Tokens of a text for each of some cases, and tokens that its rounds read."""
    texts = []
    for number in cases:
        sampling, shape, pool = CASES[number]
        text = decode(LookaheadDecoder(pair, pool=pool, group=group), sampling, shape, number)
        texts.append((text.tokens, sum(round_.target_tokens for round_ in text.rounds)))
    return texts


def refusal(work: Any) -> tuple[str, float]:
    """The message of the error that a piece of work ends with, and how long it took, in seconds."""
    started = time.perf_counter()
    with pytest.raises(ParallelError) as raised:
        work()
    return str(raised.value), time.perf_counter() - started


def refusal_of(pair: Pair, group: Any, **options: Any) -> tuple[str, float]:
    """The message of the error that the first text of a decoder ends with."""
    decoder = LookaheadDecoder(pair, group=group, **options)
    return refusal(lambda: decoder.start(PROMPT, max_new_tokens=3))


def one_of_four(rank: int, pair: Pair, ruled: Pair, folder: Path, reports: Connection) -> None:
    """Decode with three others, then with one of them; then part, and let one die and one sleep."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), 4),
        rank=rank,
        world_size=4,
        timeout=timedelta(seconds=60),
    )
    four = dist.group.WORLD
    two = [dist.new_group(ranks, timeout=timedelta(seconds=20)) for ranks in ([0, 1], [2, 3])][rank // 2]
    report: dict[str, Any] = {"four": by_cases(FOUR, pair, four), "two": by_cases(TWO, ruled, two)}
    decoder = LookaheadDecoder(pair, group=two)
    report["unseeded"] = decode(decoder, Sampling(), (3, 3, 3), None).tokens
    odd, other = rank % 2, random_model("llama", vocabulary=12, spread=0.5, seed=rank)
    report["weights"] = refusal_of(Pair(other) if odd else pair, two)
    # Shapes are the same, and so are the values, which were rounded.
    rounded = copy.deepcopy(pair.target.model).bfloat16()
    report["type"] = refusal_of(Pair(rounded.float() if odd else rounded), two)
    report["options"] = refusal_of(pair, two, pool=PoolSettings(min_acceptance=0.05 * odd))
    report["knobs' ranges"] = refusal_of(pair, two, max_window=5 + odd)
    report["prompts"] = refusal(lambda: decoder.start([rank], max_new_tokens=3))
    session = decoder.start(PROMPT, max_new_tokens=9)
    report["knobs"] = refusal(lambda: session.step({"window": 2 + rank % 2}))
    brief = dist.new_group([0, 1], timeout=timedelta(seconds=0.5))
    if rank < 2:
        session = LookaheadDecoder(pair, group=brief).start(PROMPT, max_new_tokens=9)
        session.step()
        if rank == 0:
            report["sleeps"] = refusal(session.step)
        else:
            time.sleep(1)
    session = decoder.start(PROMPT, max_new_tokens=9)
    session.step()
    if rank == 2:
        report["dies"] = refusal(session.step)
    elif rank == 3:
        reports.send(report)
        os._exit(1)  # as if it had been killed
    reports.send(report)
    os._exit(0)


def test_several_processes_give_the_text_of_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    pair = Pair(random_model("llama", vocabulary=12, spread=0.5))
    ruled = Pair(random_model("llama", vocabulary=12, spread=0.5))
    ruled.target.model.generation_config.repetition_penalty = 1.2
    alone = {"four": by_cases(FOUR, pair), "two": by_cases(TWO, ruled)}
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe(duplex=False) for _ in range(4)]
    processes = [
        fork.Process(target=one_of_four, args=(rank, pair, ruled, tmp_path, sending))
        for rank, (_, sending) in enumerate(ends)
    ]
    for process, (_, sending) in zip(processes, ends, strict=True):
        process.start()
        sending.close()
    reports = [receiving.recv() for receiving, _ in ends]
    for process in processes:
        process.join()
    for report in reports:
        for count in ("two", "four"):
            assert [tokens for tokens, _ in report[count]] == [tokens for tokens, _ in alone[count]]
            assert sum(read for _, read in report[count]) < 0.8 * sum(read for _, read in alone[count])
        assert "1 and 0 differ. Give all the same weights, in the same type" in report["weights"][0]
        assert "1 and 0 differ. Give all the same weights, in the same type" in report["type"][0]
        assert "the same options of the decoder" in report["options"][0]
        assert "the same options of the decoder" in report["knobs' ranges"][0]
        assert "prompt, max_new_tokens, sampling and seed" in report["prompts"][0]
        assert "same knobs" in report["knobs"][0]
    assert reports[0]["unseeded"] == reports[1]["unseeded"]
    assert reports[0]["unseeded"] != reports[2]["unseeded"]  # each pair agrees on a seed of its own
    for name, rank in (("sleeps", 0), ("dies", 2)):
        message, seconds = reports[rank][name]
        assert "one has died" in message
        assert seconds < 10  # and not as long as gloo waits by itself, half an hour


@given(st.integers(1, 5), st.integers(1, 9), st.lists(st.integers(1, 4), max_size=8), st.integers(1, 5))
def test_shares_hold_every_branch_once_and_all_that_it_sees(
    rows: int, columns: int, guesses: list[int], processes: int
) -> None:
    whole = layout(rows, columns, tuple(guesses))
    shares = divided(whole, processes)
    assert sorted(node for share in shares for node in share.of_whole(share.checked)) == sorted(whole.checked)
    assert sorted(node for share in shares for node in share.of_whole(share.newest)) == list(whole.newest)
    for share in shares:
        for node in share.nodes:
            parent = whole.tree.parents[node]
            assert share.tree.parents[share.numbers[node]] == (share.numbers[parent] if parent >= 0 else -1)
        assert all(node in share.place for node in (*share.checked, *share.newest))
    if processes == 1:
        assert shares[0].nodes == list(range(len(whole.tree)))


def test_a_window_is_divided_evenly() -> None:
    lengths = [len(share.nodes) for share in divided(layout(4, 15, (4,) * 15), 2)]
    assert sum(lengths) < 120 + 15  # the trunk's beginning is read twice
    assert abs(lengths[0] - lengths[1]) <= 4


def test_a_lone_process_and_batches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ParallelError, match="torchrun --nproc-per-node 2"):
        torchrun_group()
    decoder = LookaheadDecoder(Pair(random_model("llama", vocabulary=12)), group=cast(Any, object()))
    with pytest.raises(ArgumentError, match="batch cannot be divided among processes"):
        decoder.generate_batch([[1], [2]], max_new_tokens=2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("halves", [False, True])
def test_the_digest_of_packed_layers_is_that_of_plain_ones(family: str, halves: bool) -> None:
    model = random_model(family, vocabulary=12, layers=1, hidden=512)
    model = model.half().float() if halves else model
    digest = sampled_digest(copy.deepcopy(model))
    packed = Pair(model, prepack=True).target.model
    assert digest == sampled_digest(packed)
    assert any(isinstance(layer, PrepackedLinear) for layer in packed.modules())  # and still they are


def test_the_digest_tells_other_weights_and_types() -> None:
    model = random_model("llama", vocabulary=12, layers=1)
    digest = sampled_digest(model)
    assert digest == sampled_digest(copy.deepcopy(model))
    assert digest != sampled_digest(copy.deepcopy(model).bfloat16().float())
    assert digest != sampled_digest(copy.deepcopy(model).half())
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "q_proj.weight")):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.get_parameter(name).view(-1)[weight.numel() - 1] += 1e-3
            assert digest != sampled_digest(other), name
