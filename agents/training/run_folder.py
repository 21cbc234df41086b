"""The folder of a run: what lies where, and how a run begins, is found and is read.

Shared rich console; silences third-party warnings and progress bars.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler

from specgym.decoding import DamagedFileError, SpecgymError, read_sealed

if TYPE_CHECKING:
    from specgym.decoding import LatencyProfile, MixedProfile

    from ..experiments.experiment import RunSettings

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_P = TypeVar("_P", "LatencyProfile", "MixedProfile")

WEIGHTS_FILE = "policy.safetensors"
DESCRIPTION_FILE = "policy.json"
_TRIES = 6
_PAUSE = 0.1
"""Seconds between two tries for a folder: what a killed process has forked takes a moment to see that it is alone."""


class RunFileError(SpecgymError, ValueError):
    """A file of a run that is missing, damaged, or of another kind; the message names it and the way out."""


class LearnedFolder:
    """The files of one learned policy.

    ==========================================  ============================================================
    ``policy.zip``, ``vecnormalize.pkl``        the policy for Stable-Baselines3
    ``policy.safetensors``, ``policy.json``     the same policy without any framework (`specgym.agents.export`)
    ``checkpoints/``                            what ``--resume`` continues from
    ==========================================  ============================================================

    Args:
        path: the folder.
        tensorboard: where its event files go.
    """

    def __init__(self, path: Path, tensorboard: Path) -> None:
        self.path, self.tensorboard = path, tensorboard
        self.policy = path / "policy.zip"
        self.vecnormalize = path / "vecnormalize.pkl"
        self.checkpoints = path / "checkpoints"

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """Files of a finished run."""
        return self.policy, self.path / WEIGHTS_FILE, self.path / DESCRIPTION_FILE

    @property
    def complete(self) -> bool:
        """True if the policy is learned and exported."""
        return all(file.is_file() for file in self.files)

    def require_complete(self) -> None:
        """Raise RunFileError unless the policy is learned and exported."""
        if not self.complete:
            raise RunFileError(f"{self.path} holds no finished policy; go on with: python train.py --resume <run>")


class RunFolder:
    """Paths within ``runs/<name>/``.

    ==========================================  ============================================================
    ``settings.json``                           the exact configuration
    ``knobs.json``                              the recommended knobs, where knobs are learned
    ``table.json``                              the table on held-out prompts
    ``latency/``                                the latency profile that each workload's time is charged by
    ``tensorboard/``                            event files
    ==========================================  ============================================================

    The files of a `LearnedFolder` lie here too, or, where several policies are learned, in a folder for each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.knobs = path / "knobs.json"
        self.table = path / "table.json"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that has been started.

        Raises:
            RunFileError: there is none.
        """
        run = cls(path)
        if not run.settings.is_file():
            others = sorted(settings.parent.as_posix() for settings in path.parent.glob("*/settings.json"))
            hint = f"; there are: {', '.join(others[:8])}" if others else ""
            raise RunFileError(f"{path} is not the folder of a run (it has no settings.json){hint}")
        return run

    def learned(self, name: str = "") -> LearnedFolder:
        """The folder of a policy: the run's own, or one in it."""
        return LearnedFolder(self.path / name, self.tensorboard / name)

    @property
    def first_policy(self) -> Path:
        """Folder of the policy, or of the first of several."""
        several = sorted(self.path.glob(f"seed-*/{DESCRIPTION_FILE}"), key=lambda file: int(file.parent.name[5:]))
        return several[0].parent if several else self.path

    def profile_paths(self, workloads: Sequence[str]) -> list[Path]:
        """Paths of the workloads' latency profiles."""
        paths = []
        for place, name in enumerate(workloads):
            kept = sorted((self.path / "latency").glob(f"{place}-*.json"))  # earlier versions wrote other names
            name = re.sub(r"[^A-Za-z0-9.@-]+", "_", name)[-80:]
            paths.append(kept[0] if kept else self.path / "latency" / f"{place}-{name}.json")
        return paths

    def keep_profiles(
        self,
        workloads: Sequence[str],
        profile: Callable[[str], _P],
        describe: Callable[[_P], str],
        load: Callable[[str | Path], _P],
    ) -> list[Path]:
        """Keep a latency profile for every workload that has none yet.

        Args:
            workloads: names.
            profile: makes the profile of a workload.
            describe: says in words what is notable about it.
            load: reads one that is kept.

        Raises:
            LatencyProfileError: a profile that is kept is damaged.
        """
        paths = self.profile_paths(workloads)
        for name, path in zip(workloads, paths, strict=True):
            if path.is_file():
                load(path)
                continue
            started = time.perf_counter()
            latency = profile(name)
            latency.save(path)
            console.print(
                f"  {name}: {1000 * latency.autoregressive_seconds:.2f} ms/token plain, {describe(latency)} "
                f"({time.perf_counter() - started:.0f} s)",
                highlight=False,
                soft_wrap=True,
            )
        return paths


def read_json(path: Path, way_out: str, *current: str) -> dict[str, Any]:
    """Read a JSON object, whose content must be what was written.

    Args:
        path: the file.
        way_out: what to do where it is missing or damaged, as the end of a sentence.
        current: formats that have a checksum (`specgym.decoding.sealed_files.read_sealed`).

    Raises:
        RunFileError: it is missing, cannot be read, holds no JSON object, or was changed after it was written.
    """
    try:
        return read_sealed(path, *current)
    except FileNotFoundError:
        raise RunFileError(f"there is no {path}; {way_out}") from None
    except (OSError, DamagedFileError) as error:
        raise RunFileError(f"{path} cannot be read ({error}); {way_out}") from error


def require_writable(folder: Path) -> None:
    """Refuse a folder that files could not be written into, before work is done for them; it need not exist yet.

    Raises:
        OSError: it, or the nearest one above it that exists, cannot be written, or is a file.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    code = 0 if os.access(there, os.W_OK) else errno.EACCES
    if code := code if there.is_dir() else errno.ENOTDIR:
        raise OSError(code, os.strerror(code), str(there))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep the folder of a run to a block: of two that train in one, each would remove the other's checkpoints.

    What a killed process had is free, once processes that it forked have ended, too. There are no locks on Windows and
    on some network file systems.

    Raises:
        RunFileError: another process, or another block of this one, has it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not left:
                    raise RunFileError(
                        f"another process is training in {folder}; wait for it or stop it, or give another run with "
                        "--name"
                    ) from None
                time.sleep(_PAUSE)
            except OSError:
                break
            else:
                break
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # for forked processes, too, which may go on
    finally:
        os.close(handle)


def this_command() -> str:
    """The command line that runs, as a user would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


@contextmanager
def on_machine(settings: RunSettings) -> Iterator[None]:
    """Let torch use a run's threads, give models its type and device and prompts its length; restore all afterwards.

    Raises:
        PlacementError: this machine has no such device.
    """
    from specgym.decoding import models_placed, prompts_limited

    with (
        torch_threads(settings.threads),
        models_placed(settings.dtype, settings.device),
        prompts_limited(settings.max_prompt_tokens),
    ):
        yield


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use a number of threads, and restore the number afterwards; 0 leaves it alone."""
    import torch

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


console = Console()
if not console.is_terminal:
    console.width = 120  # a file or a pipe has no width, and the usual 80 would break lines for nothing


def tell_differences(differences: Sequence[str], path: Path, what: str) -> None:
    """Say where figures that were made again differ from those in a file, or that none does."""
    if not differences:
        console.print(f"All {what} equal those in {path}.", soft_wrap=True)
        return
    console.print(f"{len(differences)} {what} differ from {path} (another machine or version?):")
    for line in differences[:10]:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def quieten() -> None:
    """Keep other libraries' progress bars, hints and warnings off the terminal; this package's own come through.

    Environment variables carry it on to the processes that are started later.
    """
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|tensorboard|torch\.utils\.tensorboard|tqdm)(\.|$)")
    warnings.filterwarnings("ignore", message="You have specified a mini-batch size")  # the last one may be smaller
    ours = logging.getLogger("specgym")
    if not ours.handlers:
        ours.addHandler(RichHandler(console=console, show_path=False, show_time=False, markup=False))
        ours.setLevel(logging.INFO)
        ours.propagate = False
