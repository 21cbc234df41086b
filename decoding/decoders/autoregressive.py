"""Plain decoding, one token a pass: the baseline of every speedup."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from ..decoder import Decoder, Round, Session
from ..sampling import draw


class AutoregressiveSession(Session["AutoregressiveDecoder"]):
    """One prompt being generated token by token."""

    def _round(self, knobs: Mapping[str, float]) -> Round:
        started = time.perf_counter()
        pending = torch.tensor(self.context[-1:], device=self.target.device)
        scores = self.target.forward(pending, last=1).scores
        if self.sampling.greedy:
            choice = scores.argmax(-1)
        else:
            choice = draw(self.sampling.probabilities(scores), self.generator)
        token, greatest = torch.cat([choice.float(), scores.amax(-1)]).tolist()  # the round's only wait for the device
        self._refuse_broken(greatest)
        self._emit([int(token)])
        return Round((int(token),), 0, 0, 0.0, 0.0, time.perf_counter() - started)


class AutoregressiveDecoder(Decoder[AutoregressiveSession]):
    """Generates with the target alone; the pair's draft is not used. It has no knobs."""

    name = "autoregressive"
    lossless = True
    needs_draft = False
    session_class = AutoregressiveSession
