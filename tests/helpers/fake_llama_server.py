"""A llama-server without a model: its options, its answers in b11549's form, and its faults on demand.

FAKE_LLAMA in the environment names what it does: ``dies`` when it loads, ``breaks`` in an answer, ``ignores`` the
setting and drafts nothing, ``honours`` settings in requests as b9093 did; FAKE_LLAMA_BUILD its build. Half of the
drafted tokens are right.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

BEHAVIOUR = os.environ.get("FAKE_LLAMA", "")
BUILD = os.environ.get("FAKE_LLAMA_BUILD", "11549")
OPTIONS = dict[str, str]()
PLACES = [0] * 100
"""Accepted tokens by place, since the start."""
ROUNDS = [0]
"""Rounds with a draft, since the start."""


def setting(request: dict[str, Any]) -> int:
    """Tokens that are drafted a round."""
    if BEHAVIOUR == "honours":
        return int(request.get("speculative.n_max", 3))
    if BEHAVIOUR == "ignores" or "--spec-type" not in OPTIONS:
        return 0
    kind = {"draft-simple": "--spec-draft-n-max", "ngram-simple": "--spec-ngram-simple-size-m"}
    return int(OPTIONS[kind[OPTIONS["--spec-type"]]])


def complete(request: dict[str, Any]) -> dict[str, Any]:
    """Answer to a request; a text has as many tokens as may be."""
    left, drafted, accepted, length = request["n_predict"] - 1, 0, 0, setting(request)
    while left > 0:
        draft = min(length, left - 1)
        right = draft // 2
        ROUNDS[0] += draft > 0
        for place in range(right):
            PLACES[place] += 1
        drafted, accepted, left = drafted + draft, accepted + right, left - right - 1
    new = request["n_predict"]
    timings = {"prompt_n": 5, "prompt_ms": 12.5, "predicted_n": new, "predicted_ms": 20.0 * (new - 1)}
    if drafted:
        timings |= {"draft_n": drafted, "draft_n_accepted": accepted}
    truncated = len(request["prompt"]) + new > int(OPTIONS["--ctx-size"])
    text = {"content": "x" * new, "tokens": list(range(new)), "truncated": truncated}
    return {**text, "timings": timings, "asked": request}


class Handler(BaseHTTPRequestHandler):
    """Paths of llama-server."""

    def do_GET(self) -> None:
        name = "llamacpp:spec_decode_num_"
        count = setting({}) if ROUNDS[0] else 0
        places = [f'{name}accepted_tokens_per_pos_total{{position="{n}"}} {PLACES[n]}' for n in range(count)]
        drafts = [f"# TYPE {name}drafts_total counter", f"{name}drafts_total {ROUNDS[0]}"]
        props = {"build_info": f"b{BUILD}-abcdef0", "total_slots": 1}
        answers = {"/health": "{}", "/props": json.dumps(props), "/metrics": "\n".join(drafts + places)}
        self.reply(answers[self.path])

    def do_POST(self) -> None:
        if BEHAVIOUR == "breaks":
            print("GGML_ASSERT(n_tokens > 0) failed", file=sys.stderr, flush=True)
            os._exit(134)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(json.dumps(complete(request)))

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    if "--version" in sys.argv:
        print(f"version: {BUILD} (abcdef0)\nbuilt with GNU 13.3.0 for x86_64-linux-gnu", file=sys.stderr)
    elif BEHAVIOUR == "dies":
        sys.exit("error: invalid argument: --spec-type")
    else:
        words = [word for word in sys.argv[1:] if word != "--metrics"]
        OPTIONS.update(zip(words[::2], words[1::2], strict=True))
        HTTPServer(("127.0.0.1", int(OPTIONS["--port"])), Handler).serve_forever()
