"""State of a callback that belongs into a checkpoint, so that a run goes on as if it had never stopped."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from specgym.decoding import SpecgymError, write_json


class CheckpointError(SpecgymError, ValueError):
    """A checkpoint that is damaged or incomplete; the message names it and says how."""


@runtime_checkable
class Resumable(Protocol):
    """What `FolderCheckpointCallback` saves with every checkpoint, and `Checkpoint.restore` puts back.

    Attributes:
        state_name: of its one file, without the ending; no two of a run share it.
    """

    state_name: str

    def save_state(self, folder: Path) -> None:
        """Write ``<state_name>.<ending>`` into a folder."""

    def load_state(self, folder: Path) -> None:
        """Take over what `save_state` wrote, before learning starts.

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
        """Take over what `save_state` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or lacks an entry.
        """
        path = self._file(folder)
        try:
            self._restore(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be used ({error!r}); go on from an earlier checkpoint") from error

    def _file(self, folder: Path) -> Path:
        return folder / f"{self.state_name}.json"

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """The state as plain JSON values."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Put the state back."""
