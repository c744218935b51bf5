"""Downloads from a hub that cuts, stalls, refuses or sends something else, or that are cancelled or killed.

No file has the model's name before it is whole, and the next download is right.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from support.loopback_hub import Hub, connect, serving

from instantcharacter.files.catalog import FILES
from instantcharacter.files.download import fetch
from instantcharacter.files.folders import find

ADAPTER = FILES["adapter"]
CONTENT = bytes(range(256)) * 256
"""64 KiB."""
CHUNK = 4096
POSITIONS = [0, 1, 4095, 4096, 4097, 10_000, 20_000, 30_000, 32_768, 40_000, 50_000, 61_440, 65_000, 65_535]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(
        huggingface_hub.file_download.time, "sleep", lambda _: None
    )  # the client's before it tries again
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    with serving() as hub:
        connect(hub, monkeypatch, tmp_path / "cache", CHUNK)
        hub.files[ADAPTER.repo, ADAPTER.path] = CONTENT
        yield hub


def next_is_right(hub: Hub, folder: Path) -> None:
    """Nothing has the file's name, or it is whole; another download ends with the file alone."""
    path = folder / ADAPTER.saved_as
    found = find(ADAPTER, {"ipadapter": [folder]})
    assert found is None or found == path
    assert not path.exists() or path.read_bytes() == CONTENT
    hub.cut_after = hub.announced = hub.sent = hub.location = None
    hub.pause = 0.0
    hub.status.clear()
    assert fetch(ADAPTER, folder).read_bytes() == CONTENT
    assert [part.name for part in folder.iterdir()] == [path.name]


@pytest.mark.parametrize("position", POSITIONS)
def test_cut_once(hub, tmp_path, position):
    hub.cut_after = position
    assert fetch(ADAPTER, tmp_path / "a").read_bytes() == CONTENT
    next_is_right(hub, tmp_path / "a")


@pytest.mark.parametrize("position", POSITIONS)
def test_cut_for_good(hub, tmp_path, position):
    hub.announced, hub.sent = len(CONTENT), CONTENT[:position]
    with pytest.raises(OSError, match="try again, or fetch .* by hand"):
        fetch(ADAPTER, tmp_path / "a")
    next_is_right(hub, tmp_path / "a")


@pytest.mark.parametrize("position", POSITIONS)
def test_one_byte_is_another(hub, tmp_path, position):
    hub.sent = CONTENT[:position] + bytes([CONTENT[position] ^ 1]) + CONTENT[position + 1 :]
    with pytest.raises(OSError, match="came with other content than the hub announces .* and was removed: try again"):
        fetch(ADAPTER, tmp_path / "a")
    next_is_right(hub, tmp_path / "a")


@pytest.mark.parametrize("sent", [b"<html>Sign in</html>", b"\0", b"version https://git-lfs.github.com/spec/v1\n"])
def test_another_file_of_the_announced_length(hub, tmp_path, sent):
    hub.sent = sent.ljust(len(CONTENT))
    with pytest.raises(OSError, match="came with other content"):
        fetch(ADAPTER, tmp_path / "a")
    next_is_right(hub, tmp_path / "a")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418, 451, 500, 502, 504])
def test_refused(hub, tmp_path, status):
    hub.status[ADAPTER.repo] = status
    with pytest.raises(OSError, match="the InstantCharacter adapter"):
        fetch(ADAPTER, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    next_is_right(hub, tmp_path / "a")


@pytest.mark.parametrize(
    "location", ["{url}/tencent/InstantCharacter/resolve/main/{path}", "http://127.0.0.1:9/", "gopher://x"]
)
def test_sent_on_to_nowhere(hub, tmp_path, location):
    hub.location = location.format(url=hub.url, path=ADAPTER.path)
    with pytest.raises(OSError, match="the InstantCharacter adapter"):
        fetch(ADAPTER, tmp_path / "a")
    next_is_right(hub, tmp_path / "a")


def test_slow(hub, tmp_path):
    hub.pause = 0.05
    assert fetch(ADAPTER, tmp_path / "a").read_bytes() == CONTENT


def test_stalled(hub, tmp_path):
    hub.pause = 1.0
    with pytest.raises(OSError, match="try again, or fetch .* by hand"):
        fetch(ADAPTER, tmp_path / "a")
    next_is_right(hub, tmp_path / "a")


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("how", [KeyboardInterrupt, signal.SIGKILL])
def test_cancelled_or_killed(hub, tmp_path, position, how):
    """The first report of at least so many bytes ends the download."""

    def progress(done: int, total: int) -> None:
        if done >= position:
            if how is KeyboardInterrupt:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)

    if how is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            fetch(ADAPTER, tmp_path / "a", progress)
    elif child := os.fork():
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    else:
        try:
            getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()
            fetch(ADAPTER, tmp_path / "a", progress)
        finally:
            os._exit(0)
    next_is_right(hub, tmp_path / "a")


@pytest.mark.parametrize("call", ["replace", "mkdir"])
def test_killed_at_a_call_of_the_system(hub, tmp_path, call):
    """At the renaming the file is whole, and has not its name yet."""
    if child := os.fork():
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    else:
        try:
            setattr(os, call, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            fetch(ADAPTER, tmp_path / "a")
        finally:
            os._exit(0)
    next_is_right(hub, tmp_path / "a")


def test_a_hub_without_a_checksum_is_warned_of(hub, tmp_path, caplog):
    hub.etag = "short"
    assert fetch(ADAPTER, tmp_path / "a").read_bytes() == CONTENT
    assert "cannot be checked: the hub announces no SHA-256 of it" in caplog.text
