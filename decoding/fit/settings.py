"""Command-line settings that several fit commands share, and their checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MOST_THREADS, FitError, check_fields, number, seed_number, whole_number
from ..loading.find_model import load_model, shipped_models
from ..models.encoder.encoder_decoder import has_encoder

T = TypeVar("T")
_SHIPPED = Path(__file__).parents[1] / "data" / "models"


@dataclass
class LoopSettings:
    """Training settings of all commands that train."""

    tokens: int = 10_000_000
    """Tokens to train on; text is repeated when there is less."""
    minutes: float | None = None
    """Wall-clock budget. The learning rate then follows tokens or minutes, whichever is further on. A run that ends by
    tokens can be repeated exactly; one that ends by minutes cannot."""
    batch: int = 8
    """Windows in a batch."""
    length: int = 512
    """Tokens in a window."""
    learning_rate: float = 3e-3
    """Peak learning rate, reached after the warm-up."""
    optimiser: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices of the layers and AdamW for the rest; adamw: AdamW for everything."""
    warmup: float = 0.03
    """Share of the run in which the learning rate rises; a cosine down to a twentieth follows."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    bfloat16: bool = True
    """Multiply matrices in bfloat16; weights stay float32."""
    seed: int = 0
    """Seed of weights, document order and batches."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    device: str = "auto"
    """Device to train on: auto (the first CUDA device if there is one), cpu, cuda, cuda:1, ..."""
    checkpoint_minutes: float = 3.0
    """Minutes between two checkpoints."""
    work: Path = Path("runs/fit")
    """Folder for the state of the run; the same command resumes a killed run from there."""

    def __post_init__(self) -> None:
        whole, real = partial(checked_option, whole_number), partial(checked_option, number)
        check_fields(self, partial(whole, at_most=10**15), "tokens")
        check_fields(self, partial(whole, at_most=2**24), "batch")
        check_fields(self, partial(whole, at_least=0, at_most=2**24), "length")  # 0 where a step takes whole texts
        check_fields(self, partial(whole, at_least=0, at_most=MOST_THREADS), "threads")
        check_fields(self, partial(checked_option, seed_number), "seed")
        if self.minutes is not None:
            check_fields(self, partial(real, above=0), "minutes")
        check_fields(self, partial(real, above=0, at_most=10), "learning_rate")
        check_fields(self, partial(real, at_least=0, at_most=1), "warmup")
        check_fields(self, partial(real, at_least=0), "weight_decay", "checkpoint_minutes")
        check_fields(self, partial(real, above=0), "clip")

    def torch_device(self) -> torch.device:
        """The device to train on.

        Raises:
            FitError: torch knows no such device, or this machine has none.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=self.device)
            return torch.device(self.device)
        except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
            reason = str(error).partition("\n")[0]
            raise FitError(f"--device {self.device} cannot be used ({reason}); auto takes what there is") from error

    def set_threads(self) -> None:
        """Limit torch to the number of CPU threads asked for, if any."""
        if self.threads:
            torch.set_num_threads(self.threads)


def small_network_loop(**changes: Any) -> LoopSettings:
    """Default training settings of small networks beside a model: AdamW without weight decay."""
    return LoopSettings(length=256, optimiser="adamw", weight_decay=0.0, **changes)


@dataclass
class TextSettings:
    """Generation of the text to learn from, by the target."""

    texts: int = 4000
    """Prompts for the target to continue. A tenth of them is held out for early stopping and the report."""
    prompt_tokens: int = 64
    """Longest prompt, in tokens; the shortest is half as long."""
    new_tokens: int = 128
    """Longest continuation, in tokens."""
    temperature: float = 0.3
    """Sampling temperature of the target; 0 is greedy decoding."""
    generate_batch: int = 64
    """Prompts continued at a time."""

    def __post_init__(self) -> None:
        whole = partial(checked_option, whole_number)
        check_fields(self, partial(whole, at_most=10**9), "texts")
        check_fields(self, whole, "prompt_tokens", "new_tokens", "generate_batch")
        check_fields(self, partial(checked_option, number, at_least=0), "temperature")

    @property
    def width(self) -> int:
        """Tokens of the longest prompt with its continuation."""
        return self.prompt_tokens + self.new_tokens


@dataclass(kw_only=True)
class OwnTextSettings:
    """Settings of every command that learns from text written by the target."""

    target: str
    """Target model: a folder, a hub id, or the name of a shipped model."""
    out: Path
    """Folder to write."""
    text: tuple[Path, ...] = ()
    """Text files and folders to cut prompts from, each a domain. Default: the corpus."""
    corpus: Path = Path("runs/corpus")
    """Folder of the corpus, as written by python -m recipes.corpus."""
    own_text: tyro.conf.OmitArgPrefixes[TextSettings] = field(default_factory=TextSettings)
    """Generation of the text to learn from; text that another command generated with the same settings and --dtype is
    reused."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the models' weights. Default: bfloat16 on CUDA if they stay fixed, float32 otherwise. Networks trained
    beside them are always float32."""
    check_steps: int = 50
    """Steps between two checks of the loss on held-out text."""
    patience: int = 8
    """Checks without progress before training ends; 0 trains to the end. The best weights are kept in either case."""
    licence: str = "other"
    """Licence of the weights, for the card."""
    loop: tyro.conf.OmitArgPrefixes[LoopSettings] = field(default_factory=LoopSettings)
    """Training."""


@dataclass(kw_only=True)
class HeadsSettings(OwnTextSettings):
    """Settings of the commands that train Medusa heads."""

    tree_size: int = 16
    """Candidates a round in the report."""
    report_prompts: int = 24
    """Prompts to measure the speed on for the report, over all domains."""
    report_tokens: int = 64
    """Tokens to generate after each prompt of the report."""


@dataclass(kw_only=True)
class PairSettings(OwnTextSettings):
    """Settings of the commands that train networks for draft trees."""

    draft: str
    """Draft model: a folder, a hub id, or the name of a shipped model, with the token numbers of the target."""


def checked_option(check: Callable[..., T], name: str, value: object, **limits: Any) -> T:
    """Check the value of an option, which the message names as the command line does.

    Args:
        check: such as `number`.
        name: of the setting.
        value: of the setting.
        limits: for the check.

    Raises:
        FitError: the value is refused.
    """
    return check(f"--{name.replace('_', '-')}", value, error=FitError, **limits)


def require_least(settings: object, **least: int) -> None:
    """Refuse numbers below ``least``, the smallest allowed values of attributes of the settings, by name.

    Raises:
        FitError: a value is smaller; the message names the option.
    """
    for name, low in least.items():
        checked_option(whole_number, name, getattr(settings, name), at_least=low)


def check_own_text(settings: OwnTextSettings, what: str, **least: int) -> None:
    """Refuse settings that are out of range, before anything is loaded; ``what`` is trained, for messages.

    Raises:
        FitError: a number is below its ``least`` value, or the optimiser is not AdamW without weight decay.
    """
    require_least(settings, **least, check_steps=1, patience=0)
    if settings.loop.optimiser != "adamw" or settings.loop.weight_decay:
        raise FitError(
            f"{what} must be trained by AdamW without weight decay: leave out --optimiser and --weight-decay"
        )


def check_out(out: Path, *read: str | Path) -> None:
    """Refuse to write over a model or folder that is read.

    Raises:
        FitError: ``out`` is one of them.
    """
    for name in read:
        folder = place_of(str(name)) or Path(name)
        if folder.expanduser().resolve() == out.expanduser().resolve():
            raise FitError(f"{out} would be written over {name}, which is read: give another --out")


def place_of(target: str) -> Path | None:
    """The folder of a target; None for a hub id or a GGUF file."""
    if Path(target).expanduser().is_dir():
        return Path(target).expanduser()
    return _SHIPPED / target if target in shipped_models() else None


def load_target(name: str, **placement: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a target to learn from, as `load_model`.

    Raises:
        FitError: it has an encoder, for which only ``fit draft`` makes anything.
    """
    model, tokenizer = load_model(name, **placement)
    if has_encoder(model):
        raise FitError(
            f"{name} has an encoder, and this command learns from texts that a causal LM continues. A draft for it is "
            "a smaller model of its family, prompt-lookup, suffix, or one that `fit draft` distils"
        )
    return model, tokenizer


def dtype_of(settings: OwnTextSettings, frozen: bool) -> torch.dtype:
    """Type of the models' weights; ``frozen`` says whether those of the target stay fixed."""
    if settings.dtype is not None:
        return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if frozen and settings.loop.torch_device().type == "cuda" else torch.float32


def load_frozen(settings: OwnTextSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load a target that stays as it is, for what learns to read its states; its name is the third.

    Raises:
        ModelNotFoundError: there is no such target.
        FitError: it would be written over, or has an encoder.
    """
    check_out(settings.out, settings.target)
    settings.loop.set_threads()
    place = {"dtype": dtype_of(settings, frozen=True), "device": settings.loop.torch_device()}
    model, tokenizer = load_target(settings.target, **place)
    name = Path(settings.target).name
    if Path(settings.target).expanduser().exists():
        model.name_or_path = name  # files that are passed on do not name folders of this machine
    return model.requires_grad_(False), tokenizer, name
