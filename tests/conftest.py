"""One Ray for the whole test session, and the smallest experiment that runs from end to end."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

import ray_explain.distributed  # noqa: F401 - sets how Ray behaves, before anything imports it
from tests.object_store import FlakyProxy, Server, environment
from tests.serving import serving

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Every run draws anew, and one that fails prints the example and the line that draws it again. In CI the draws are the
# same each time, so that a change is judged alone. Examples bound a test's time, not a clock: machines are busy.
settings.register_profile("anew", derandomize=bool(os.environ.get("CI")), print_blob=True, deadline=None)
settings.load_profile("anew")


class ObjectStore(NamedTuple):
    """Where `s3://` leads in these tests."""

    server: Server
    proxy: FlakyProxy


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server behind a proxy; credentials and endpoint are in the environment."""
    server = Server(tmp_path_factory.mktemp("s3") / "server.log")
    proxy = FlakyProxy(server.port)
    before = dict(os.environ)
    os.environ.update(environment(proxy.port))
    yield ObjectStore(server, proxy)
    for name in environment(proxy.port):
        os.environ.pop(name) if name not in before else os.environ.update({name: before[name]})
    proxy.stop()
    server.stop()


@pytest.fixture(scope="session")
def running_ray(object_store: ObjectStore) -> Iterator[None]:
    """Ray with four logical CPUs: on fewer, training workers would leave none for those who feed them."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def world_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer target with the world's tokenizer, as a Hugging Face folder."""
    from ray_explain.world.facts import World
    from ray_explain.world.pretraining import TargetSize, new_target, save_target
    from ray_explain.world.tokenizer import world_tokenizer

    folder = tmp_path_factory.mktemp("target")
    tokenizer = world_tokenizer(World())
    model = new_target("llama", tokenizer, TargetSize(d_model=32, n_layers=2, n_heads=2), seed=0)
    save_target(model, tokenizer, folder)
    return folder


class ChatServer(ThreadingHTTPServer):
    """An endpoint on this machine that speaks the OpenAI protocol.

    `script` says what it replies to a prompt on the n-th call: a text; a status; bytes, sent as they are; or a number
    of seconds (a float) in which it sends nothing. `asked` is what it was sent: path, body, key.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ChatHandler)
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.script: Callable[[str, int], str | int | bytes | float] = lambda prompt, n: "5"
        self.address = f"http://127.0.0.1:{self.server_port}/v1"


class _ChatHandler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.at_once, self.server.most_at_once)
            self.server.asked.append((self.path, body, self.headers.get("Authorization")))
            reply = self.server.script(body["messages"][-1]["content"], len(self.server.asked))
        if isinstance(reply, float):
            time.sleep(reply)
        else:
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
        if isinstance(reply, str):
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            reply = json.dumps({"choices": [{"message": {"content": reply}}], "usage": usage}).encode()
        if isinstance(reply, bytes):
            self.wfile.write(reply)
        with self.server.lock:
            self.server.at_once -= 1

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[ChatServer]:
    with serving(ChatServer()) as server:
        yield server
