"""A real S3-speaking server on loopback for the tests, and a proxy before it that fails now and then."""

import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.fs as fs

# Nobody's: so that a search for them finds every place that they leak to.
ACCESS_KEY = "AKIAQ7TESTNEVERTELL0"
SECRET_KEY = "wJalrXUtnFEMI0never0tell0anybody0this0key"
BUCKET = "experiments"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(port: int) -> dict[str, str]:
    """What makes `s3://` mean the server at this port, for this process and those it starts."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Server:
    """Moto in a process of its own, with one bucket; its content is in memory."""

    def __init__(self, log: Path, host: str = "127.0.0.1") -> None:
        self.port = free_port()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", host, "-p", str(self.port)],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait()
        self.files().create_dir(BUCKET)

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the S3 server did not start")

    def files(self) -> fs.S3FileSystem:
        """A way to it that avoids what is tested."""
        return fs.S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            endpoint_override=f"127.0.0.1:{self.port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def names(self) -> list[str]:
        """Of all objects."""
        found = self.files().get_file_info(fs.FileSelector(BUCKET, recursive=True))
        return [info.path for info in found if info.type == fs.FileType.File]

    def everything(self) -> dict[str, bytes]:
        """All objects, while nobody removes any."""
        system = self.files()
        return {name: system.open_input_stream(name).readall() for name in self.names()}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class FlakyProxy:
    """Passes requests on to a server. With `faults` on, a share of them meets a failure; all are counted."""

    def __init__(self, server_port: int, *, seed: int = 0) -> None:
        self.faults: dict[str, float] = {}  # kind -> share of the requests
        self.met: Counter[str] = Counter()
        chance, lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                body = self._body()
                with lock:
                    fault = next((kind for kind, share in proxy.faults.items() if chance.random() < share), "none")
                    proxy.met[fault] += 1
                if fault == "503":
                    return self._say(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
                if fault == "dropped before":
                    return self._hang_up()
                status, headers, content = self._pass_on(body)
                if fault == "dropped after":  # it has been done, but nobody hears of it
                    return self._hang_up()
                self._say(status, headers, content, cut=fault == "cut")
                return None

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def _body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                left_out = ("expect", "transfer-encoding", "content-length", "connection")
                headers = {k: v for k, v in self.headers.items() if k.lower() not in left_out}
                connection = HTTPConnection("127.0.0.1", server_port)
                connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                return answer.status, dict(answer.getheaders()), content

            def _say(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                if self.command != "HEAD":
                    headers = {"Content-Length": str(len(content))}
                self.send_header("Content-Length", headers.get("Content-Length", "0"))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self._hang_up()

            def _hang_up(self) -> None:
                self.close_connection = True
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # clients hang up as well
                pass

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.port = int(self._listener.server_address[1])
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()
