"""Downloading of model files from the hub.

huggingface_hub does it: it obeys ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN``, and goes on where a connection
was cut. It downloads into ``.NAME.part``; a file gets its name if its SHA-256 is the one that the hub announces. After
a cancel or a kill a download begins again with huggingface_hub 2, which keeps no part of it; older ones go on.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import io
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .atomic import check_replaceable
from .catalog import ADAPTER_FILE, ModelFile
from .errors import first_line

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Callback ``(done, total)`` in bytes; it may raise to cancel."""


class WrongContent(OSError):
    """A file came whole, and is another one than the hub announces."""


RESERVED = 256 * 2**20
"""Bytes that stay free on the disk."""


def fetch(file: ModelFile, directory: str | Path, progress: Progress | None = None, token: str | None = None) -> Path:
    """Download a model file; a file that is there is not downloaded again. Processes that download one file take turns.

    Args:
        file: one of :data:`~.catalog.FILES`.
        directory: of its folder, such as ComfyUI's ``models/ipadapter``.
        progress: called as bytes arrive, with huggingface_hub 1.2 or newer.
        token: for this download alone, not saved; ``HF_TOKEN`` or that of ``hf auth login`` if None.

    Returns:
        Its path.

    Raises:
        OSError: no network, offline, no such file, licence not accepted, disk full, connection cut, or other bytes
            than the hub announces; the message says what to do.
        ValueError: a token with characters that no token has.
    """
    if token and not re.fullmatch("[!-~]+", token):  # the client would log it
        raise ValueError("this is no Hugging Face token: expected hf_ and letters, in one line")
    path = Path(directory) / file.saved_as
    if not path.is_file():
        with _advised(file, path.parent):
            check_replaceable(path, "a file", Path.is_file)
            _download(file, path, progress, token or None)
    return path


def adapter_file(source: str) -> Path:
    """The path of an adapter's file.

    Args:
        source: a file, or a folder or hub repository with the released one.

    Raises:
        OSError: the hub cannot be reached, or has no such repository or file.
    """
    path = Path(source)
    if path.is_dir():
        return path / ADAPTER_FILE
    if path.exists() or path.suffix in (".bin", ".safetensors"):
        return path
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(source, ADAPTER_FILE))
    except (OSError, ValueError) as error:  # ValueError: no name of a repository
        raise OSError(
            f"{ADAPTER_FILE} of {source} could not be fetched ({first_line(error)}) Fetch it by hand from "
            f"https://huggingface.co/{source} and give its path."
        ) from error


def _download(file: ModelFile, path: Path, progress: Progress | None, token: str | None) -> None:
    """Download a model file into a folder beside ``path``, check it there, and rename it."""
    import huggingface_hub
    from huggingface_hub.utils import WeakFileLock

    partial = path.with_name(f".{path.name}.part")
    settings: dict[str, Any] = {"local_dir": partial, "token": token}
    if progress and "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters:
        settings["tqdm_class"] = _reporting(progress)
    elif progress:
        logger.warning("huggingface_hub %s reports no progress of downloads; 1.2 does", huggingface_hub.__version__)
    announced = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(file.repo, file.path), token=token)
    _check_disk(path.parent, announced.size or 0)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(partial / "lock"):
            if path.is_file():  # the process that had the lock downloaded it
                return
            _clear_leftovers(partial, announced.etag)
            downloaded = Path(huggingface_hub.hf_hub_download(file.repo, file.path, **settings))
            _check_content(downloaded, announced.etag)
            downloaded.replace(path)
    finally:
        if not any(partial.rglob("*.incomplete")):  # with which older clients go on
            shutil.rmtree(partial, ignore_errors=True)


def _check_disk(folder: Path, size: int) -> None:
    """Raise ``OSError`` unless the folder's disk has room for a file of this size."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size + RESERVED:
        raise OSError(errno.ENOSPC, f"{_gigabytes(size)} are needed, {_gigabytes(free)} are free", str(existing))


def _clear_leftovers(partial: Path, etag: str | None) -> None:
    """Remove what killed processes left of a download, but for the part that older clients go on with."""
    for leftover in partial.rglob("*.incomplete"):
        if not leftover.name.endswith(f".{etag}.incomplete"):
            leftover.unlink()


def _check_content(path: Path, etag: str | None) -> None:
    """Remove a file and raise ``OSError`` if its SHA-256 is not the one that the hub announces for it (its ETag)."""
    if not re.fullmatch("[0-9a-f]{64}", etag or ""):
        logger.warning("%s cannot be checked: the hub announces no SHA-256 of it, but %s", path.name, etag)
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != etag:
        size = path.stat().st_size
        path.unlink()
        raise WrongContent(f"{size} bytes of SHA-256 {digest.hexdigest()[:12]}…, not {str(etag)[:12]}…")


@contextmanager
def _advised(file: ModelFile, target: Path) -> Iterator[None]:
    """Turn errors of the download into ``OSError`` that says what to do next."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        advice = _advice(error, file, f"or fetch {file.path} by hand from {file.page} and put it into {target}")
        raise OSError(f"{file.title} ({file.path} of {file.repo}) {advice}.") from error


def _advice(error: Exception, file: ModelFile, by_hand: str) -> str:
    """The cause of an error, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and (file.gated or "gated" in type(error).__name__.lower()):
        return f"is behind a licence: accept it at {file.page}, run `hf auth login` or set HF_TOKEN, and try again"
    if status in (401, 403):
        return f"was refused ({status}): check HF_TOKEN or run `hf auth login`, {by_hand}"
    if status == 404:
        return f"is not at {file.page} any more: see whether it has moved there, {by_hand}"
    if status is not None:
        return f"could not be downloaded (the hub says {status}): try again later, {by_hand}"
    if isinstance(error, WrongContent):
        return f"came with other content than the hub announces ({error}) and was removed: try again, {by_hand}"
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO)):
        return f"cannot be written to {error.filename or 'the disk'} ({error.strerror}): make room there and try again"
    if "Consistency check" in str(error) or type(error).__name__ in ("ChunkedEncodingError", "RemoteProtocolError"):
        return f"came cut off ({first_line(error)}): try again, {by_hand}"
    return f"could not be reached: go online, unset HF_HUB_OFFLINE or check HF_ENDPOINT, and try again, {by_hand}"


def _reporting(progress: Progress) -> type:
    """A tqdm that calls ``progress`` and prints nothing."""
    from tqdm import tqdm

    class Reporting(tqdm):
        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            progress(int(self.n), int(self.total or self.n))
            return shown

    return Reporting


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
