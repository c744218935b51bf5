"""A model hub on the loopback, for huggingface_hub's own client."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest


class Hub:
    """What the hub has, and how it misbehaves.

    Attributes:
        files: ``(repo, path)`` → content.
        status: answered in place of a file's, by repo.
        error_code: the hub's word for it (``X-Error-Code``), by repo.
        cut_after: bytes of a content after which the connection is cut, once.
        announced: a size to announce in place of the real one.
        sent: a content to send in place of the announced one.
        location: where to send the client on to, in place of an answer.
        etag: announced in place of the content's SHA-256.
        pause: seconds before each block of 8 KiB.
        tokens: the ``Authorization`` of each request.
        ranges: the ``Range`` of each request for content.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.status: dict[str, int] = {}
        self.error_code: dict[str, str] = {}
        self.cut_after: int | None = None
        self.announced: int | None = None
        self.sent: bytes | None = None
        self.location: str | None = None
        self.etag: str | None = None
        self.pause = 0.0
        self.tokens: list[str | None] = []
        self.ranges: list[str | None] = []
        self.url = ""


def connect(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path, chunk: int = 64 * 1024) -> None:
    """Have huggingface_hub's client of this process ask the hub, in blocks of so many bytes."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        for name, value in (("ENDPOINT", hub.url), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.tokens.append(self.headers.get("Authorization"))
            parts = self.path.strip("/").split("/")
            repo, path = "/".join(parts[:2]), "/".join(parts[4:])
            content = hub.files.get((repo, path))
            if hub.location is not None:
                self.head(302, 0, {"Location": hub.location})
                return
            status = hub.status.get(repo, 404 if content is None else 200)
            if status != 200 or content is None:
                code = hub.error_code.get(repo, "EntryNotFound" if status == 404 else "")
                self.head(status, 0, {"X-Error-Code": code} if code else {})
                return
            etag = hub.etag or hashlib.sha256(content).hexdigest()
            first = 0
            if body:
                hub.ranges.append(self.headers.get("Range"))
            if wanted := self.headers.get("Range"):
                first = int(wanted.removeprefix("bytes=").rstrip("-").split("-")[0])
            size = hub.announced or len(content)
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes"}
            if first:
                headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            self.head(206 if first else 200, size - first, headers)
            if body:
                self.send((content if hub.sent is None else hub.sent)[first:])

        def head(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def send(self, content: bytes) -> None:
            cut, hub.cut_after = hub.cut_after, None
            for start in range(0, len(content[:cut]), 8192):
                threading.Event().wait(hub.pause)  # tests replace time.sleep
                self.wfile.write(content[:cut][start : start + 8192])
            if cut is not None or hub.announced:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
