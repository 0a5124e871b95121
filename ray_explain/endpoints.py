"""Chat models at any endpoint that speaks the OpenAI protocol: asked side by side, again when busy, and once only.

What could not be had is None, never a text: the caller counts it as undescribed or unscored. An endpoint that says
nothing any more, or nothing of use, ends the work: to ask it for all of a large table would take hours.
"""

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ray_explain import records, storage
from ray_explain.errors import BadInput, JobFailed

T = TypeVar("T")
logger = logging.getLogger(__name__)

UNUSABLE, SILENT, UNREACHABLE = "unusable reply", "no reply in time", "out of reach"
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # asked again
_MISCONFIGURED = {401, 402, 403, 404, 405}  # no request will fare better; 402: the account is empty
_LONGEST_PAUSE = 60.0  # seconds, whatever an endpoint asks for
_CHUNK = 1 << 16
ENOUGH = 8  # requests of which at least one should have got a reply of use
GIVEN_UP_AFTER = 32  # requests in a row without any reply, after all tries (a minute, out of reach): it is not there


class Ask(NamedTuple):
    """One request. Requests that are equal are made once, and not again in later runs."""

    prompt: str  # of the user
    max_tokens: int
    temperature: float = 0.0
    sample: int = 0  # tells apart several replies to one prompt, where the temperature is above 0
    system: str = ""  # no system message when empty


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is asked, and how patiently."""

    model: str
    cache: str  # folder, local or remote, of the replies that could be used; each is asked for once
    address: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; an unset one sends none
    tries: int = 5
    pause: float = 1.0  # seconds before the second try; doubled before each further one
    timeout: float = 60.0  # seconds for one try, from its start to the last byte of the reply
    threads: int = 8
    input_price: float = 0.0  # of a million tokens
    output_price: float = 0.0


@dataclass
class Usage:
    """What was asked and what it took."""

    asked: int = 0  # different requests
    cached: int = 0  # of them answered by an earlier run
    unanswered: int = 0  # of them without an answer that could be used
    calls: int = 0  # tries that went to the endpoint
    failures: Counter[str] = field(default_factory=Counter)  # of calls, by reason: "429", "no reply in time", ...
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0  # in the currency of the endpoint's prices

    def plain(self) -> dict[str, Any]:
        """As JSON, for a manifest."""
        return {**self.__dict__, "failures": dict(sorted(self.failures.items())), "cost": round(self.cost, 6)}


class Chat:
    """A model at an endpoint. Threads may share it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.usage = endpoint, Usage()
        self._lock = threading.Lock()
        self._unheard = 0  # requests in a row, of all threads, that got no reply

    def replies(self, asks: Sequence[Ask], read: Callable[[Ask, str], T | None]) -> list[T | None]:
        """What `read` makes of each request and the reply to it; None where no reply came that it could read.

        `read` gives None for a reply that cannot be used; the model is then asked again.

        Raises:
            BadInput: the endpoint refuses to be asked like this: a wrong key, model or address.
            JobFailed: it left `GIVEN_UP_AFTER` requests in a row without any reply, or answered none of all, which were
                `ENOUGH` or more.
        """
        different = list(dict.fromkeys(asks))
        with ThreadPoolExecutor(self.endpoint.threads) as threads:
            found = dict(zip(different, threads.map(lambda ask: self._reply(ask, read), different), strict=True))
        if len(found) >= ENOUGH and all(made is None for made in found.values()):
            raise self._given_up(len(found))
        return [found[ask] for ask in asks]

    def _reply(self, ask: Ask, read: Callable[[Ask, str], T | None]) -> T | None:
        self._count(asked=1)
        name = records.content_id(self.endpoint.model, *ask)
        file = f"{self.endpoint.cache}/{name[:2]}/{name}.json"
        kept = _kept(file)
        made = None if kept is None else read(ask, kept)
        if made is not None:
            self._count(cached=1)
            return made
        reply: str | _Failed = ""
        for attempt in range(self.endpoint.tries):
            self._check_heard()
            if isinstance(reply, _Failed):
                time.sleep(min(max(self.endpoint.pause * 2 ** (attempt - 1), reply.wait), _LONGEST_PAUSE))
            reply = self._call(ask)
            if isinstance(reply, _Failed):
                self._count(failures=reply.reason)
                if not reply.again:
                    break
                continue
            made = read(ask, reply)
            if made is not None:
                storage.write_json({"model": self.endpoint.model, **ask._asdict(), "reply": reply}, file)
                self._heard(True)
                return made
            self._count(failures=UNUSABLE)
        self._count(unanswered=1)
        self._heard(not (isinstance(reply, _Failed) and reply.again))
        return None

    def _heard(self, anything: bool) -> None:
        with self._lock:
            self._unheard = 0 if anything else self._unheard + 1
        self._check_heard()

    def _check_heard(self) -> None:
        """Raises: JobFailed: the endpoint is not there."""
        if self._unheard >= GIVEN_UP_AFTER:
            raise self._given_up(GIVEN_UP_AFTER, " in a row")

    def _given_up(self, n: int, how: str = "") -> JobFailed:
        told = ", ".join(f"{count} x {why}" for why, count in self.usage.failures.most_common())
        return JobFailed(
            f"the model {self.endpoint.model!r} at {self.endpoint.address} answered none of {n} requests{how} "
            f"({told}); start again when it answers: what was done stays done"
        )

    def _call(self, ask: Ask) -> "str | _Failed":
        """The text of the reply, or why there is none."""
        self._count(calls=1)
        deadline = time.monotonic() + self.endpoint.timeout
        try:
            with urllib.request.urlopen(self._request(ask), timeout=self.endpoint.timeout) as response:
                return self._text(json.loads(_read_until(response, deadline)))
        except urllib.error.HTTPError as error:
            return self._refusal(error)
        except TimeoutError:
            return _Failed(SILENT)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError):
            return _Failed(UNUSABLE)
        except urllib.error.URLError as error:
            return _Failed(SILENT if isinstance(error.reason, TimeoutError) else UNREACHABLE)
        except (OSError, http.client.HTTPException):
            return _Failed(UNREACHABLE)

    def _text(self, body: Any) -> "str | _Failed":
        usage = body.get("usage") or {}
        tokens_in, tokens_out = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        cost = (tokens_in * self.endpoint.input_price + tokens_out * self.endpoint.output_price) / 1e6
        self._count(input_tokens=tokens_in, output_tokens=tokens_out, cost=cost)
        text = body["choices"][0]["message"]["content"]
        return text if isinstance(text, str) else _Failed(UNUSABLE)

    def _refusal(self, error: urllib.error.HTTPError) -> "_Failed":
        if error.code in _MISCONFIGURED:
            raise BadInput(
                f"the model {self.endpoint.model!r} at {self.endpoint.address} refuses with {error.code} "
                f"{error.reason}: check the address, the model's name, the key in ${self.endpoint.key_variable} "
                "and what its account holds; what was answered is kept"
            ) from error
        again = error.code in _BUSY
        if not again:
            logger.warning("%s refuses a request with %s: %r", self.endpoint.address, error.code, _start_of(error))
        return _Failed(str(error.code), again=again, wait=_seconds(error.headers.get("Retry-After")))

    def _request(self, ask: Ask) -> urllib.request.Request:
        system = [{"role": "system", "content": ask.system}] if ask.system else []
        body = {
            "model": self.endpoint.model,
            "messages": [*system, {"role": "user", "content": ask.prompt}],
            "temperature": ask.temperature,
            "max_tokens": ask.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.endpoint.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(f"{self.endpoint.address}/chat/completions", json.dumps(body).encode(), headers)

    def _count(self, failures: str = "", **numbers: float) -> None:
        with self._lock:
            if failures:
                self.usage.failures[failures] += 1
            for name, number in numbers.items():
                setattr(self.usage, name, getattr(self.usage, name) + number)


class _Failed(NamedTuple):
    reason: str
    again: bool = True
    wait: float = 0.0  # seconds the endpoint asks for


def _kept(file: str) -> str | None:
    """The reply of an earlier run, if there is one."""
    try:
        return str(storage.read_json(file)["reply"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def _read_until(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body. urllib's own timeout counts anew with each byte that comes.

    Raises:
        TimeoutError: it is not whole by then.
    """
    parts = []
    while part := response.read1(_CHUNK):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _start_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except OSError:
        return ""


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date: the own pauses do
        return 0.0
