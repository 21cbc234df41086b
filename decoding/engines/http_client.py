"""A client of an engine that is talked to over HTTP; its errors have the engine's words, or its last ones."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from .engine import EngineError
from .process import EngineProcess

_LONGEST = 1000  # characters of a refusal that are shown


class HttpClient:
    """A client of an engine.

    Args:
        name: of the engine, for messages.
        address: such as http://localhost:8000.
        process: the engine's, if it is ours; proxies are then passed by, and its last words shown if it has died.
        seconds: that an answer may take.

    Raises:
        ArgumentError: the address is none.
    """

    def __init__(self, name: str, address: str, process: EngineProcess | None = None, seconds: float = 900.0) -> None:
        if not address.startswith(("http://", "https://")):
            raise ArgumentError(f"the address of {name} must begin with http:// or https://, got {address!r}")
        self.name, self.address, self._process, self._seconds = name, address.rstrip("/"), process, seconds
        proxies = [] if process is None else [urllib.request.ProxyHandler({})]
        self._opener = urllib.request.build_opener(*proxies)

    def answers(self, path: str) -> bool:
        """True if a path can be had now."""
        try:
            with self._opener.open(self.address + path, timeout=5.0) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str) -> Any:
        """Return the JSON at a path. Errors as for `text`."""
        return self._json(path, self.text(path))

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """Send JSON to a path and return the JSON of the answer. Errors as for `text`."""
        return self._json(path, self.text(path, body))

    def text(self, path: str, body: Mapping[str, object] | None = None) -> str:
        """Return the text of an answer.

        Args:
            path: with a slash first.
            body: sent as JSON; None to send nothing.

        Raises:
            EngineError: the engine has died, does not answer or refuses; the message has its words.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=self._seconds) as answer:
                return str(answer.read().decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            words = error.read().decode("utf-8", "replace")[:_LONGEST]
            raise EngineError(f"{self.name} at {self.address} refused {path} ({error.code}): {words}") from error
        except (OSError, http.client.HTTPException) as error:
            if self._process is not None:
                self._process.check_soon()
                raise self._process.error(f"{self.name} did not answer {path} ({error})") from error
            raise EngineError(
                f"{self.name} at {self.address} does not answer {path} ({error}); is it running there?"
            ) from error

    def _json(self, path: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise EngineError(
                f"{self.name} at {self.address} answered {path} with no JSON, is it another server? {text[:_LONGEST]!r}"
            ) from error
