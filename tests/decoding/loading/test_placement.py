import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specgym.decoding import PlacementError, default_placement, load_pair, models_placed, place_models
from specgym.decoding.loading.find_model import placement

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with models_placed(None, None):
        yield


def test_a_default_holds_inside_and_is_restored() -> None:
    with models_placed("bfloat16", "cpu"):
        assert default_placement() == ("bfloat16", "cpu")
        assert placement(None, None) == (torch.bfloat16, "cpu")
        with models_placed(None, "cpu"):
            assert placement(None, None) == (torch.float32, "cpu")
        assert load_pair("tiny-3m-lookup", offline=True).target.dtype == torch.bfloat16
        assert load_pair("tiny-3m-lookup", dtype=torch.float32, offline=True).target.dtype == torch.float32
    assert default_placement() == (None, None)


def test_a_process_that_is_started_has_the_same_default() -> None:
    with models_placed("float16", "cpu"):
        script = "from specgym.decoding import default_placement; print(*default_placement())"
        root = Path(__file__).resolve().parents[3]
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=os.environ.copy())
    assert done.stdout.split() == ["float16", "cpu"]


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        ("int8", None, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (None, "gpu", "device must be cpu, cuda, cuda:<number> or auto, got 'gpu'"),
        (None, "cpu:1", "device must be cpu"),
        pytest.param(None, "cuda", "no device .cuda.; there are: cpu. Name one", marks=WITHOUT_CUDA),
        (None, "cuda:99", "no device 'cuda:99'; there are: cpu"),
    ],
)
def test_what_models_cannot_have_is_refused_and_changes_nothing(
    dtype: str | None, device: str | None, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        place_models(dtype, device)
    assert default_placement() == (None, None)
