"""Decoding in a forked process, which is where Gymnasium's asynchronous vector environments run by default on Linux.

OpenMP's threads do not survive a fork: a child whose parent has used them waits for ever at its first wide operation.
So children decode with one thread each, which is also what several of them on one machine want.
"""

from __future__ import annotations

import os

import torch

_threads_of_parent: int | None = None


def decoding_threads() -> int:
    """CPU threads of decoding here; in a forked child its parent's, so that both have the same latency profile."""
    return _threads_of_parent or torch.get_num_threads()


def _use_one_thread() -> None:
    global _threads_of_parent
    _threads_of_parent = decoding_threads()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_use_one_thread)
