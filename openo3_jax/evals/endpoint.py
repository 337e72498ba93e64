"""One chat completion of an OpenAI-compatible server, over HTTP: deadlines, retries, and nothing believed unread."""

import contextlib
import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from openo3_jax.errors import InputError

MAX_REPLY_BYTES = 1 << 20
MAX_WAIT_S = 60.0  # between two attempts, whatever the server asks for
# Statuses that say that the request itself is wrong: asking again would not help.
USERS_MISTAKES = (400, 401, 403, 404, 405, 422)


class EndpointError(RuntimeError):
    """The server gave no usable reply in any attempt. Whoever asked keeps the question and may ask again later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and how to ask. `url` is the base, such as `http://localhost:8000/v1`; `key` goes into the header."""

    url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout_s: float = 60.0  # for one attempt, from the request to the last byte
    attempts: int = 6
    wait_s: float = 1.0  # before the second attempt, twice as long before each further one

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"endpoint {self.url!r}: expected http://host:port/v1 or https://host/v1")
        if self.timeout_s <= 0 or self.attempts < 1 or self.wait_s < 0:
            raise InputError(
                f"endpoint: need timeout_s > 0, attempts >= 1, wait_s >= 0; got {self.timeout_s}, {self.attempts}, "
                f"{self.wait_s}"
            )

    def complete(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int) -> str:
        """The text of the greedy reply.

        Raises: InputError where the server calls the request wrong (key, model, address), EndpointError where every
        attempt failed: no connection, no reply in time, status 429 or 5xx, or a reply that is no chat completion.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0}
        reason, wait_s = "", self.wait_s
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(wait_s, MAX_WAIT_S))
                wait_s *= 2
            try:
                return _content(self._post(body))
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in USERS_MISTAKES:
                        raise InputError(
                            f"{self.url}: status {error.code} for model {self.model!r} ({_excerpt(error)}); check the "
                            "address, the model's name and the key"
                        ) from None
                    reason = f"status {error.code}"
                    wait_s = max(wait_s, _retry_after_s(error))
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
                reason = f"{type(error).__name__}: {error}"
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                reason = f"no chat completion ({type(error).__name__}: {error})"
        raise EndpointError(f"{self.url}: no usable reply in {self.attempts} attempts; the last one: {reason[:200]}")

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)  # __post_init__ saw the scheme
        deadline_s = time.monotonic() + self.timeout_s
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            pieces, size = [], 0
            while piece := response.read1(1 << 16):
                size += len(piece)
                if size > MAX_REPLY_BYTES:
                    raise ValueError(f"more than {MAX_REPLY_BYTES} bytes")
                if time.monotonic() > deadline_s:  # a server that sends a byte now and then
                    raise TimeoutError(f"not complete after {self.timeout_s:g} s")
                pieces.append(piece)
        return b"".join(pieces)


def _content(raw: bytes) -> str:
    content = json.loads(raw)["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}")
    return content


def _retry_after_s(error: urllib.error.HTTPError) -> float:
    with contextlib.suppress(TypeError, ValueError):  # absent, or a date
        return float(error.headers.get("Retry-After"))
    return 0.0


def _excerpt(error: urllib.error.HTTPError) -> str:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return " ".join(error.read(300).decode(errors="replace").split())
    return error.reason
