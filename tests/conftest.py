"""The smallest things that the tests need: random models of every architecture, and toy models that are tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too; before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SPECGYM_TIMING_REPEATS", "3")  # latency profiles that only have to be there
os.environ.setdefault("SPECGYM_TIMING_TRIES", "1")  # and not to be right on a busy machine

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from specgym.decoding.models.joint.passes import Answer, JoinedPasses, Request
from tests.helpers.table_models import TableModel, random_table
from tests.helpers.warm_python import WarmPython

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

FAMILIES = ("llama", "opt", "gpt2", "qwen2", "gpt_neox", "phi", "mistral")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower with more threads, and several test runs may share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Server of processes that need not import torch first."""
    server = WarmPython()
    yield server
    server.close()


@pytest.fixture(scope="session")
def small_cluster() -> Iterator[None]:
    """Ray on this machine, with two workers, and two GPUs as far as Ray knows."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        ray.init("local", num_cpus=2, num_gpus=2, **quiet)
        yield
        ray.shutdown()


def random_model(
    family: str,
    *,
    layers: int = 2,
    vocabulary: int = 96,
    hidden: int = 32,
    context: int = 256,
    attention: str = "sdpa",
    spread: float = 0.3,
    seed: int = 0,
    **more: Any,
) -> PreTrainedModel:
    """A small model with random weights, wide enough apart (`spread`) that its logits never tie; it knows no EOS.

    Args:
        family: one of `FAMILIES`.
        more: further settings of the architecture's configuration.
    """
    torch.manual_seed(seed)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    usual: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "initializer_range": spread,
        **ends,
    }
    grouped = {**usual, "num_key_value_heads": 2}
    config: Any
    kind: Any
    if family == "llama":
        config, kind = LlamaConfig(**{**grouped, **more}), LlamaForCausalLM
    elif family == "qwen2":
        config, kind = Qwen2Config(**{**grouped, **more}), Qwen2ForCausalLM
    elif family == "mistral":
        config, kind = MistralConfig(**{**grouped, "sliding_window": None, **more}), MistralForCausalLM
    elif family == "phi":
        config, kind = PhiConfig(**{**usual, **more}), PhiForCausalLM
    elif family == "gpt_neox":
        config, kind = GPTNeoXConfig(**{**usual, **more}), GPTNeoXForCausalLM
    elif family == "opt":
        opt = {**usual, "ffn_dim": usual.pop("intermediate_size"), "init_std": usual.pop("initializer_range")}
        opt.pop("intermediate_size"), opt.pop("initializer_range")
        config, kind = OPTConfig(**{**opt, "word_embed_proj_dim": hidden, **more}), OPTForCausalLM
    elif family == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_embd=hidden,
            n_layer=layers,
            n_head=4,
            n_positions=context,
            initializer_range=spread,
            **{**ends, **more},
        )
        kind = GPT2LMHeadModel
    else:
        raise ValueError(f"no family {family!r}")
    model: PreTrainedModel = kind._from_config(config, attn_implementation=attention)
    return model.eval()


def noisy_copy(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A draft that agrees with a model often but not always: the same weights with relative noise."""
    copied = type(model)._from_config(model.config, attn_implementation=model.config._attn_implementation)
    copied.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copied.parameters():
            weight += noise * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return copied.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`random_model`."""
    return random_model


@pytest.fixture(scope="session")
def make_noisy() -> Callable[..., PreTrainedModel]:
    """`noisy_copy`."""
    return noisy_copy


@pytest.fixture(scope="session")
def make_table() -> Callable[..., TableModel]:
    """A `TableModel` over a `random_table`: arguments of `random_table`, then those of `TableModel` by name."""

    def make(vocabulary: int, seed: int, spread: float = 1.0, **more: Any) -> TableModel:
        return TableModel(random_table(vocabulary, seed, spread), **more)

    return make


@pytest.fixture(scope="session")
def table_of() -> type[TableModel]:
    """The class `TableModel` itself."""
    return TableModel


@pytest.fixture
def joint_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of texts that were read in one pass each, as they come."""
    counts: list[int] = []
    read = JoinedPasses.read

    def counted(self: JoinedPasses, requests: Sequence[Request]) -> list[Answer]:
        counts.append(len(requests))
        return read(self, requests)

    monkeypatch.setattr(JoinedPasses, "read", counted)
    return counts
