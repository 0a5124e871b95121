"""A Hugging Face hub on loopback: repositories are folders, of which it tells what was asked for."""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves `root/owner/name`, one commit of each, to the hub's own library: see `environment`.

    `downloaded` are the files whose content was sent. While `down` is set, it answers 503 to all.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.downloaded, self.requests, self.down = root, list[str](), 0, False
        self.address = f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """What makes a new process ask this hub, and keep what it got in `home`."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}

    def files(self, repository: str) -> dict[str, Path]:
        folder = self.root / repository
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, repository: str) -> str:
        """Of the names and sizes of its files."""
        told = json.dumps([(name, path.stat().st_size) for name, path in self.files(repository).items()])
        return hashlib.sha1(told.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests += 1
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if self.server.down:
            self._say(503, b"Service Unavailable", {})
        elif api and self._known(api.group(1), api.group(3)):
            self._say_json(self._tree(api.group(1)) if api.group(2) == "tree" else self._info(api.group(1)))
        elif file and self._known(file.group(1), file.group(2)):
            self._file(file.group(1), file.group(3))
        elif not api and not file:
            self._say(404, b"{}", {})

    do_HEAD = do_GET

    def _known(self, repository: str, revision: str | None) -> bool:
        here = self.server.files(repository)
        known = bool(here) and revision in (None, "main", self.server.commit(repository))
        if not known:
            code = "RevisionNotFound" if here else "RepoNotFound"
            self._say(404, b'{"error": "not found"}', {"X-Error-Code": code})
        return known

    def _info(self, repository: str) -> dict[str, Any]:
        files = self.server.files(repository).items()
        siblings = [{"rfilename": name, "size": path.stat().st_size, "blobId": "0"} for name, path in files]
        return {"id": repository, "sha": self.server.commit(repository), "siblings": siblings}

    def _tree(self, repository: str) -> list[dict[str, Any]]:
        files = self.server.files(repository).items()
        return [{"type": "file", "path": name, "size": path.stat().st_size, "oid": "0"} for name, path in files]

    def _file(self, repository: str, name: str) -> None:
        path = self.server.files(repository).get(name)
        if path is None:
            return self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": self.server.commit(repository),
            "Accept-Ranges": "bytes",
        }
        if self.command == "GET":
            self.server.downloaded.append(name)
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin is None:
            return self._say(200, content, headers)
        start = int(begin.group(1))
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._say(206, content[start:], headers | {"Content-Range": span})

    def _say_json(self, value: Any) -> None:
        self._say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _say(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
