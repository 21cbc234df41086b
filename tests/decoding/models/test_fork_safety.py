import multiprocessing
import sys

import pytest
import torch

from specgym.decoding.models.supported import decoding_threads


def _work(results: "multiprocessing.SimpleQueue[tuple[int, int]]") -> None:
    wide = torch.ones(512, 512)
    (wide @ wide).exp().sum().item()
    results.put((torch.get_num_threads(), decoding_threads()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks by default")
def test_a_child_forked_after_threads_were_used_computes_with_one() -> None:
    torch.set_num_threads(2)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    _work(results)
    assert results.get() == (2, 2)
    child = context.Process(target=_work, args=(results,), daemon=True)
    child.start()
    child.join(timeout=60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert results.get() == (1, 2)  # and it knows how many its parent decodes with
