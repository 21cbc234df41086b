"""Checkpoints that are whole or absent: policy, reward statistics, step counter, random states, callbacks' states.

A folder is filled under a temporary name and renamed when everything is in it, with a checksum for every file. A killed
process therefore leaves either an intact checkpoint or something that `intact_checkpoints` passes over.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import random
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from stable_baselines3.common.callbacks import CheckpointCallback

from specgym.decoding import (
    ArgumentError,
    DamagedFileError,
    SpecgymError,
    check_files,
    file_digests,
    named_errors,
    read_sealed,
    whole_number,
    write_json,
    write_sealed,
)

_FORMAT = "specgym-checkpoint-2"
_UNSEALED = "specgym-checkpoint-1"  # its state.json has no checksum
_STATE = "state.json"
_TAKEN = ("policy", "state", "vecnormalize")
_UNFINISHED = ".unfinished-"
_log = logging.getLogger("specgym.checkpoints")


class CheckpointError(SpecgymError, ValueError):
    """A checkpoint that is damaged or incomplete; the message names it and says how."""


@runtime_checkable
class Resumable(Protocol):
    """State that `FolderCheckpointCallback` saves with every checkpoint, and `Checkpoint.restore` puts back.

    Attributes:
        state_name: name of its file, without the ending; unique within a run.
    """

    state_name: str

    def save_state(self, folder: Path) -> None:
        """Write ``<state_name>.<ending>`` into a folder."""

    def load_state(self, folder: Path) -> None:
        """Take over the result of `save_state`, before learning starts.

        Raises:
            CheckpointError: the file cannot be used.
        """


class JsonState:
    """A `Resumable` whose state is a small JSON object, ``<state_name>.json``."""

    state_name: str

    def save_state(self, folder: Path) -> None:
        """Write ``<state_name>.json`` into a folder."""
        write_json(self._file(folder), self._state())

    def load_state(self, folder: Path) -> None:
        """Take over the result of `save_state`.

        Raises:
            CheckpointError: the file is missing, damaged, or lacks an entry.
        """
        path = self._file(folder)
        try:
            self._restore(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be used ({error!r}); go on from an earlier checkpoint") from error

    def _file(self, folder: Path) -> Path:
        return folder / f"{self.state_name}.json"

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Put the state back."""


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint on disk.

    Attributes:
        folder: folder with ``policy.zip``, ``state.json``, for a normalised environment ``vecnormalize.pkl``, and a
            file for each callback with a state. Zip and pickle run code when they are loaded: trust whoever wrote them.
        steps: environment steps learned from.
        random: states for `restore_random_states`.
    """

    folder: Path
    steps: int
    random: dict[str, Any]

    @property
    def policy(self) -> Path:
        """Zip file of the model."""
        return self.folder / "policy.zip"

    @property
    def vecnormalize(self) -> Path:
        """Pickle of the reward statistics."""
        return self.folder / "vecnormalize.pkl"

    def restore(self, resumables: Sequence[Resumable]) -> None:
        """Put callbacks back to where they were; those that the checkpoint does not know start afresh.

        Raises:
            CheckpointError: a callback cannot use its file.
        """
        for resumable in resumables:
            if any(self.folder.glob(f"{resumable.state_name}.*")):
                resumable.load_state(self.folder)

    def restore_random_states(self) -> None:
        """Put the random number generators of Python, NumPy and torch back to where they were."""
        ours, numpys, torchs = _generators(self.random)
        random.setstate(ours.getstate())
        np.random.set_state(numpys.get_state(legacy=True))  # noqa: NPY002
        torch.set_rng_state(torchs.get_state())


class FolderCheckpointCallback(CheckpointCallback):
    """Saves between two rollouts, when the policy has learned from every step counted, and at the end.

    Args:
        save_freq: environment steps, over all environments, between two checkpoints; at least 1.
        save_path: the folder of checkpoints; each is a folder ``step_<steps>`` in it.
        keep: how many to keep, the newest; at least 2, so that a damaged one has a predecessor.
        resumables: callbacks whose states belong to the checkpoint. They act at the start of a rollout or at the end of
            training before the checkpoint is saved: they stand before this callback in the list of callbacks.

    Attributes:
        steps_learned: environment steps that the policy has learned from, or is learning from.
        begun: True once learning has begun; before, there is nothing to save.

    Raises:
        ValueError: an argument is out of range, or two states have the same name.
    """

    def __init__(
        self, save_freq: int, save_path: str | Path, keep: int = 3, resumables: Sequence[Resumable] = ()
    ) -> None:
        save_freq, self.keep = whole_number("save_freq", save_freq), whole_number("keep", keep, at_least=2)
        names = [*_TAKEN, *(resumable.state_name for resumable in resumables)]
        repeated = [name for place, name in enumerate(names) if name in names[:place]]
        if repeated:
            raise ArgumentError(f"resumables: the state name {repeated[0]!r} is taken; names must differ")
        super().__init__(save_freq, str(save_path), save_vecnormalize=True)
        self.resumables = tuple(resumables)
        self.steps_learned = 0
        self._saved_at = 0
        self.begun = False

    def _init_callback(self) -> None:
        super()._init_callback()
        self.begun = True
        self._saved_at = self.steps_learned = self.model.num_timesteps
        for leftover in Path(self.save_path).glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _on_step(self) -> bool:
        return True  # in the middle of a rollout there are steps that nothing has been learned from

    def _on_rollout_start(self) -> None:
        self.steps_learned = self.model.num_timesteps
        if self.steps_learned - self._saved_at >= self.save_freq:
            self.save()

    def _on_rollout_end(self) -> None:
        self.steps_learned = self.model.num_timesteps

    def _on_training_end(self) -> None:
        self.save()

    def save(self) -> Path:
        """Write a checkpoint now, counting the steps learned from, and remove the oldest beyond `keep`."""
        counted, self.model.num_timesteps = self.model.num_timesteps, self.steps_learned
        try:
            folder = self._write(Path(self.save_path))
        finally:
            self.model.num_timesteps = counted
        self._saved_at = self.steps_learned
        for old in _newest_first(Path(self.save_path))[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def _write(self, parent: Path) -> Path:
        final = parent / f"step_{self.steps_learned:09d}"
        if final.exists():
            # Nothing was learned since. Written again, there would be a moment without it.
            with contextlib.suppress(CheckpointError):
                return read_checkpoint(final).folder
            shutil.rmtree(final)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=_UNFINISHED))
        try:
            with named_errors(final, temporary):
                self._fill(temporary)
                os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def _fill(self, temporary: Path) -> None:
        """Write every file of a checkpoint."""
        policy = io.BytesIO()
        self.model.save(policy)
        (temporary / "policy.zip").write_bytes(policy.getvalue())
        normaliser = self.model.get_vec_normalize_env()
        if normaliser is not None:
            normaliser.save(str(temporary / "vecnormalize.pkl"))
        for resumable in self.resumables:
            resumable.save_state(temporary)
        state = {
            "format": _FORMAT,
            "steps": self.steps_learned,
            "files": file_digests(temporary, sorted(file.name for file in temporary.iterdir())),
            "random": _random_states(),
        }
        write_sealed(temporary / _STATE, state)
        for file in temporary.iterdir():
            _flush(file)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)  # temporary folders are private


def intact_checkpoints(folder: str | Path) -> Iterator[Checkpoint]:
    """Intact checkpoints of a folder, the newest first; damaged ones are passed over with a warning."""
    for path in _newest_first(Path(folder)):
        try:
            yield read_checkpoint(path)
        except CheckpointError as error:
            _log.warning("%s; using an earlier checkpoint", error)


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint's files against their checksums.

    Raises:
        CheckpointError: a file is missing, damaged or not listed, or a random state is none.
    """
    try:
        state = read_sealed(path / _STATE, _FORMAT)
        if state["format"] not in (_FORMAT, _UNSEALED):
            raise CheckpointError(f"checkpoint {path} is of another version ({state['format']!r}, not {_FORMAT!r})")
        if "policy.zip" not in state["files"]:
            raise CheckpointError(f"checkpoint {path} has no policy.zip")
        present = {file.name for file in path.iterdir() if not file.name.startswith(".")} - {_STATE}
        check_files(path, state, *state["files"], *sorted(present))
        if type(state["steps"]) is not int or not 0 <= state["steps"] < 2**63:
            raise ArgumentError(f"steps is {state['steps']!r}")
        _generators(state["random"])
        return Checkpoint(path, state["steps"], state["random"])
    except CheckpointError:
        raise
    except DamagedFileError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} is incomplete ({error!r})") from error


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), reverse=True)


def _random_states() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), place, has_gauss, cached],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def _generators(states: dict[str, Any]) -> tuple[random.Random, np.random.RandomState, torch.Generator]:
    """Generators of Python, NumPy and torch in the states that `_random_states` took down.

    Raises:
        ValueError: a state is none, or, as the libraries have it, KeyError, TypeError, OverflowError or RuntimeError.
    """
    ours, numpys, torchs = random.Random(), np.random.RandomState(), torch.Generator()
    version, numbers, gauss = states["python"]
    ours.setstate((version, tuple(numbers), gauss))
    name, keys, place, has_gauss, cached = states["numpy"]
    if not 0 <= place <= len(keys):  # NumPy takes any, and would read beyond the keys
        raise ArgumentError(f"the place {place} is beyond the keys of NumPy's generator")
    numpys.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torchs.set_state(torch.frombuffer(bytearray(base64.b64decode(states["torch"])), dtype=torch.uint8))
    return ours, numpys, torchs


def _flush(path: Path) -> None:
    # Some file systems cannot; the rename is still atomic.
    with path.open("rb") as file, contextlib.suppress(OSError):
        os.fsync(file.fileno())
