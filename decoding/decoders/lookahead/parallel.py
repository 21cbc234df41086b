"""Lookahead decoding over several processes: each reads a share of the window and of the guesses.

"Lookahead parallelism" of Fu et al. (arXiv 2402.02057). Columns of the window and guesses are branches that do not see
each other, so they can be read on different devices, each with the weights and with the keys and values of the text.
One message a round tells all processes what each has found: the likeliest token after each of its nodes and
the chances of those it verified. From then on all do the same, with the same random numbers, and hold the same text,
window and pool. A number about a node that several have read, which may differ by rounding, is taken from the first.

Keys and values never travel. A process in whose share the accepted tokens were not reads them with its next pass.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import LogitsProcessor

from ...errors import ArgumentError, SpecgymError, number
from ...models.joint.joining import AT_WORK
from ...models.kv_cache import TokenTree
from ...sampling import Sampling, draw
from .decoder import LookaheadDecoder, LookaheadSession, Seen
from .window import Layout

_HEAD = 2
"""Numbers of a message before those of `LookaheadSession._values`."""


class ParallelError(SpecgymError, RuntimeError):
    """Processes that should decode together and cannot; the message says which, why, and the way out."""


def torchrun_group(device: str | torch.device = "cpu", *, timeout: float = 60.0) -> ProcessGroup:
    """Join the processes that `torchrun` has started, for `LookaheadDecoder(pair, group=...)`.

    Args:
        device: of this process's target. On CUDA each needs a device of its own, such as `cuda:{LOCAL_RANK}`.
        timeout: after so many seconds without an answer a process is given up.

    Returns:
        All processes, connected by NCCL on CUDA and otherwise by gloo.

    Raises:
        ParallelError: this process was not started by `torchrun`, or the others do not come.
    """
    waits = timedelta(seconds=number("timeout", timeout, above=0))
    device = torch.device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized() and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise ParallelError(
            "this process is not one of several: start it with `torchrun --nproc-per-node 2 SCRIPT.py` (or more), or "
            "leave out `group`"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if dist.is_initialized():
            return cast(ProcessGroup, dist.new_group(timeout=waits, backend=backend))
        dist.init_process_group(backend, timeout=waits)
    except RuntimeError as error:
        raise ParallelError(
            f"the other processes do not come within {timeout:g} s ({error}); start them all"
        ) from error
    return cast(ProcessGroup, dist.group.WORLD)


class Share(Layout):
    """The nodes of a pass that one process reads, with numbers of their own: those behind it, then some of the pass's.

    Args:
        whole: the pass.
        columns: of the window, whose tokens this process finds; those before them belong to the trunk and are read too.
        guesses: by number, that it verifies.
        behind: tokens that it has still to read before the current one.

    Attributes:
        nodes: of the whole pass, ascending.
        numbers: that these nodes have here.
    """

    def __init__(self, whole: Layout, columns: range, guesses: Sequence[int], behind: int) -> None:
        self.whole, self.columns, self.of_guesses, self.behind = whole, columns, guesses, behind
        width = len(whole.trunk)
        below = [row + column for row in range(width, whole.newest.stop, width) for column in columns]
        verified = [node for guess in guesses for node in whole.guesses[guess]]
        self.nodes = [*range(max(columns.stop, 1)), *below, *verified]
        self.numbers = {node: behind + place for place, node in enumerate(self.nodes)}
        parents = [self.numbers.get(whole.tree.parents[node], behind - 1) for node in self.nodes]
        self.tree = TokenTree([*range(-1, behind - 1), *parents])
        self._moved = {}

    @property
    def newest(self) -> list[int]:  # type: ignore[override]
        """The nodes of the window's last row that are this process's."""
        return [self.numbers[self.whole.newest[column]] for column in self.columns]

    @cached_property
    def checked(self) -> list[int]:
        """The nodes that this process verifies."""
        trunk = [self.numbers[column] for column in self.columns if column]
        return trunk + [self.numbers[node] for guess in self.of_guesses for node in self.whole.guesses[guess]]

    @cached_property
    def verified(self) -> list[int]:
        """The current token, the nodes that are verified, and those before them."""
        return sorted({self.behind, *self.checked, *(self.tree.parents[node] for node in self.checked)})

    @cached_property
    def scored(self) -> list[int]:
        """Nodes whose scores are needed."""
        return self.verified if self.whole.newest == self.whole.trunk else [*self.verified, *self.newest]

    def of_whole(self, nodes: Sequence[int]) -> list[int]:
        """The numbers of some of its nodes in the whole pass."""
        return [self.nodes[node - self.behind] for node in nodes]

    def kept(self, chains: Sequence[Sequence[int]], accepted: Sequence[int]) -> list[int]:
        """The longest path that this process has read of the text's new tokens, from its first node on.

        Args:
            chains: tokens of all chains of the whole pass.
            accepted: tokens that were accepted.
        """
        best: list[int] = []
        for chain, nodes in zip(chains, self.whole.chains, strict=True):
            path: list[int] = []
            for token, right, node in zip(chain, accepted, nodes, strict=False):
                if token != right or node not in self.numbers:
                    break
                path.append(self.numbers[node])
            best = max(best, path, key=len)
        return [*range(self.behind + 1), *best]


@lru_cache(maxsize=512)
def divided(whole: Layout, processes: int) -> tuple[Share, ...]:
    """Divide a pass among processes, so that the longest share is short: columns in order, then guesses one by one.

    A share of columns a to b of a window of r rows has b tokens of the trunk, and (r - 1) (b - a) others.
    """
    width = len(whole.trunk)
    below = whole.newest.stop // width - 1
    bounds: list[int] = []
    for longest in range(1, whole.newest.stop + 1):
        bounds = [0]
        for _ in range(processes):
            bounds.append(min(width, max(bounds[-1], (longest + below * bounds[-1]) // (1 + below))))
        if bounds[-1] == width:
            break
    columns = [range(start, stop) if stop > start else range(0) for start, stop in pairwise(bounds)]
    lengths = [max(part.stop, 1) + below * len(part) for part in columns]
    guesses: list[list[int]] = [[] for _ in columns]
    for guess, nodes in enumerate(whole.guesses):
        least = lengths.index(min(lengths))
        guesses[least].append(guess)
        lengths[least] += len(nodes)
    return tuple(Share(whole, part, some, 0) for part, some in zip(columns, guesses, strict=True))


@lru_cache(maxsize=512)
def _behind(share: Share, tokens: int) -> Share:
    return Share(share.whole, share.columns, share.of_guesses, tokens) if tokens else share


class ParallelSession(LookaheadSession):
    """One prompt being generated by the processes of a group; each has such a session, and they all say the same."""

    def __init__(
        self,
        decoder: LookaheadDecoder,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        logits_processor: Sequence[LogitsProcessor] = (),
    ) -> None:
        if AT_WORK.get() is not None:
            raise ArgumentError(
                "texts of a batch cannot be divided among processes: generate them one by one, or leave out `group`"
            )
        self._group = cast(ProcessGroup, decoder.group)
        self._rank, self._size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._device = decoder.pair.target.device if dist.get_backend(self._group) == "nccl" else torch.device("cpu")
        highs = {knob.name: int(knob.high) for knob in decoder.knobs}
        # The longest message there can be, so that its length never depends on what processes should agree about.
        self._longest = _HEAD + 1 + 4 * (highs["window"] + 1) + 2 * highs["guesses"] * (highs["ngram"] - 1)
        target = decoder.pair.target
        offered = random.SystemRandom().getrandbits(48)
        compared = {
            "weights, in the same type: load the target from the same files everywhere": decoder.weights_digest,
            "options of the decoder": (type(decoder).__name__, decoder.pool, target.vocabulary_size, highs),
            "prompt, max_new_tokens, sampling and seed": (list(prompt), max_new_tokens, repr(sampling), seed),
        }
        first = self._exchanged([0, offered, *map(_mark, compared.values())], _HEAD + len(compared), "group")
        for column, what in enumerate(compared, _HEAD):
            self._require_same(first, column, what)
        super().__init__(
            decoder, prompt, max_new_tokens, sampling, int(first[0][1]) if seed is None else seed, logits_processor
        )

    def _look(self, tokens: Tensor, plan: Layout, chains: Sequence[Sequence[int]]) -> Seen:
        """Read this process's share of window and guesses, and judge what all have found."""
        shares = divided(plan, self._size)
        missing = self.context[self.target.length : -1]
        if missing and self.target.pass_limit(self.target.length) != self.target.pass_limit(len(self.context) - 1):
            self.target.read(missing, of=len(self.context))  # what lies beyond is read in a pass of its own
            missing = []
        share = _behind(shares[self._rank], len(missing))
        read = torch.cat([tokens.new_tensor(missing), tokens[share.nodes]])
        scores = self.target.forward(read, share.tree, rows=share.scored_on(tokens.device)).scores
        passed = time.perf_counter()
        values, p = self._values(scores, read, share)
        state = (self.context[-8:], len(self.context), chains, plan.tree.parents)
        messages = self._exchanged([_mark(state), len(read), *values], self._longest, "knobs and logits processors")
        merged, teller = self._merged(plan, shares, [message[_HEAD:] for message in messages])
        accepted, last, new, sureness = self._judge(merged, plan, chains)
        self.target.keep(share.kept(chains, chains[accepted.guess][: accepted.length]))
        if p is None:
            token = int(merged[plan.place[last] - len(plan.scored)])
        else:
            mine = teller[last] == self._rank
            row = p[share.place[share.numbers[last]]] if mine else p.new_ones(1)
            # All draw, so that their generators stay alike, and the one that has read the node tells the others.
            token = self._told(
                self._drawn(row, accepted.rejected) if mine else int(draw(row, self.generator)), teller[last]
            )
        return Seen(accepted, token, new, sureness, int(max(message[1] for message in messages)), passed)

    def _merged(
        self, plan: Layout, shares: Sequence[Share], messages: Sequence[Sequence[float]]
    ) -> tuple[list[float], dict[int, int]]:
        """The numbers of the whole pass, in the order of `_values`, and the process that tells of each scored node."""
        sureness: dict[int, float] = {}
        chances: dict[int, float] = {}
        choices: dict[int, float] = {}
        teller: dict[int, int] = {}
        for rank, (share, message) in enumerate(zip(shares, messages, strict=True)):
            numbers = iter(message[1:])
            for node in share.of_whole(share.newest) if self._weighs else ():
                sureness[node] = next(numbers)
            for node in share.of_whole(share.checked):
                chances[node] = next(numbers)
            for node in share.of_whole(share.scored):
                choices.setdefault(node, next(numbers))
                teller.setdefault(node, rank)
        sure = [sureness[node] for node in plan.newest] if self._weighs else []
        total = sum(message[0] for message in messages)
        return [
            total, *sure, *(chances[node] for node in plan.checked), *(choices[node] for node in plan.scored)
        ], teller  # fmt: skip

    def _exchanged(self, values: Sequence[float], length: int, what: str) -> list[list[float]]:
        """The messages of all processes, of `length` numbers each; the first of each says what it is about.

        Raises:
            ParallelError: they are about different things, or a process does not answer.
        """
        message = torch.zeros(length, dtype=torch.float64)
        message[: len(values)] = torch.tensor(values, dtype=torch.float64)
        message = message.to(self._device)
        messages = [torch.empty_like(message) for _ in range(self._size)]
        self._communicate(lambda: dist.all_gather(messages, message, group=self._group))
        result: list[list[float]] = torch.stack(messages).tolist()
        self._require_same(result, 0, what)
        return result

    @staticmethod
    def _require_same(messages: Sequence[Sequence[float]], column: int, what: str) -> None:
        """Raise ParallelError that names the processes that differ from process 0 in a number of their messages."""
        parted = [rank for rank, other in enumerate(messages) if other[column] != messages[0][column]]
        if parted:
            raise ParallelError(
                f"the processes do not decode the same text: {', '.join(map(str, parted))} and 0 differ. Give all the "
                f"same {what}"
            )

    def _told(self, token: int, teller: int) -> int:
        """The token that one of the processes has drawn."""
        message = torch.tensor([token], device=self._device)
        source = dist.get_global_rank(self._group, teller)
        self._communicate(lambda: dist.broadcast(message, source, group=self._group))
        return int(message)

    def _communicate(self, send: Callable[[], Any]) -> None:
        try:
            send()
        except RuntimeError as error:
            raise ParallelError(
                f"process {self._rank} of {self._size} got no answer from the others: one has died, or takes longer "
                f"than the group's timeout ({error}). Look at its output, and start all of them anew"
            ) from error


def _mark(what: object) -> int:
    return zlib.crc32(repr(what).encode())
