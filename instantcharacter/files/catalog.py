"""Which model files InstantCharacter needs, and where they come from.

Folders have ComfyUI's names. Fetching is huggingface_hub's: it resumes, keeps to ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``
and ``HF_TOKEN``, and gives a file its name only when it is whole.
"""

from __future__ import annotations

import errno
import inspect
import io
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FLUX = "black-forest-labs/FLUX.1-dev"
SIGLIP = "google/siglip-so400m-patch14-384"
DINOV2 = "facebook/dinov2-giant"
ADAPTER = "tencent/InstantCharacter"
ADAPTER_FILE = "instantcharacter_ip-adapter.bin"

Progress = Callable[[int, int], None]
"""Told of the bytes that are here, and of all of them; may raise to cancel."""

TOY = "toy"
"""Chosen in place of a model: a small one of its kind, which comes with the pack."""
TOY_FOLDER = Path(__file__).parents[2] / "assets/toy"
TOY_FILES = {
    "flux": "flux",
    "siglip": "siglip",
    "dinov2": "dinov2",
    "adapter": "adapter.safetensors",
    "lora": "pixel_art.safetensors",
}
"""In that folder, by the names of :data:`FILES`, and a LoRA."""

SPARE = 256 * 2**20
"""Bytes to leave free on a disk."""


@dataclass(frozen=True)
class ModelFile:
    """A file that InstantCharacter needs.

    Attributes:
        title: what people call it.
        repo: its repository on the hub.
        path: its path there, and in the folder it is saved to.
        folder: that folder, under ComfyUI's ``models``.
        subfolder: in which of its folders, if in one.
        gigabytes: about how large it is.
        searched: ComfyUI's names of the folders where it may be already.
        names: what else it may be called there, in which of its folders.
        gated: whether its licence must be accepted on the hub first.
    """

    title: str
    repo: str
    path: str
    folder: str
    gigabytes: float
    searched: tuple[str, ...]
    subfolder: str = ""
    names: tuple[str, ...] = ()
    gated: bool = False

    @property
    def saved_as(self) -> Path:
        """Its path in its folder."""
        return Path(self.subfolder, self.path)

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.repo}"


FILES = {
    "flux": ModelFile(
        "FLUX.1-dev",
        FLUX,
        "flux1-dev.safetensors",
        "unet",
        23.8,
        ("diffusion_models",),
        names=("flux1-dev.sft", "FLUX.1-dev"),
        gated=True,
    ),
    "clip_l": ModelFile(
        "CLIP-L", "comfyanonymous/flux_text_encoders", "clip_l.safetensors", "text_encoders", 0.25, ("text_encoders",)
    ),
    "t5": ModelFile(
        "T5-XXL",
        "comfyanonymous/flux_text_encoders",
        "t5xxl_fp16.safetensors",
        "text_encoders",
        9.8,
        ("text_encoders",),
        names=("t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
    ),
    "vae": ModelFile(
        "FLUX's VAE", FLUX, "ae.safetensors", "vae", 0.34, ("vae",), names=("flux_vae.safetensors",), gated=True
    ),
    "siglip": ModelFile(
        "SigLIP",
        "Comfy-Org/sigclip_vision_384",
        "sigclip_vision_patch14_384.safetensors",
        "clipvision",
        0.86,
        ("clipvision", "clip_vision"),
        names=("siglip-so400m-patch14-384/model.safetensors",),
    ),
    "dinov2": ModelFile(
        "DINOv2 giant",
        DINOV2,
        "model.safetensors",
        "clipvision",
        4.5,
        ("clipvision", "clip_vision"),
        subfolder="dinov2-giant",
        names=("dinov2-giant.safetensors", "dinov2_giant.safetensors"),
    ),
    "adapter": ModelFile(
        "the InstantCharacter adapter",
        ADAPTER,
        ADAPTER_FILE,
        "ipadapter",
        5.6,
        ("ipadapter",),
        names=("instantcharacter_ip-adapter.safetensors",),
    ),
}
"""By the name that the command line and the nodes have for each."""


def toy(name: str) -> Path:
    """The toy model of this name in :data:`TOY_FILES`.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = TOY_FOLDER / TOY_FILES[name]
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: the toy models come with the pack's repository; clone it")
    return path


def fetch(file: ModelFile, directory: str | Path, progress: Progress | None = None, token: str | None = None) -> Path:
    """Fetch a model file from the hub into a directory; a file that is there whole is not fetched again.

    Args:
        file: which.
        directory: of its folder, such as ComfyUI's ``models/ipadapter``.
        progress: told how far it is; what it raises cancels. huggingface_hub older than 1.2 cannot tell.
        token: for this file alone; ``HF_TOKEN`` or ``hf auth login`` if not given. It is kept nowhere.

    Raises:
        OSError: no network, offline, no such file, licence not accepted, disk full, or cut off: what to do is in it.
        ValueError: a token that cannot be sent.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if token and not re.fullmatch("[!-~]+", token):  # the client's error, which is logged, would quote it
        raise ValueError("this is no Hugging Face token: expected hf_ and letters, in one line")
    target = Path(directory) / file.subfolder
    settings: dict[str, Any] = {"local_dir": target, "token": token or None}
    if progress and "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters:
        settings["tqdm_class"] = _reporting(progress)
    elif progress:
        logger.warning("huggingface_hub %s cannot tell how far a download is; 1.2 can", huggingface_hub.__version__)
    with _explained(file, target):
        if not constants.HF_HUB_OFFLINE:
            _check_disk(file, target, token)
        return Path(huggingface_hub.hf_hub_download(file.repo, file.path, **settings))


def adapter_file(source: str) -> Path:
    """An adapter's file: ``source`` if it ends like one, else the released one in a folder or a hub repository.

    Raises:
        OSError: the hub cannot be reached, or has no such repository or file.
    """
    if Path(source).suffix in (".bin", ".safetensors"):
        return Path(source)
    if Path(source).is_dir():
        return Path(source, ADAPTER_FILE)
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(source, ADAPTER_FILE))
    except OSError as error:
        raise OSError(
            f"{ADAPTER_FILE} of {source} could not be fetched ({_first_line(error)}) Fetch it by hand from "
            f"https://huggingface.co/{source} and give its path."
        ) from error


def _check_disk(file: ModelFile, target: Path, token: str | None) -> None:
    """Raise ``OSError`` unless what is missing of the file fits on the disk it goes to."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if (target / file.path).is_file():
        return
    size = get_hf_file_metadata(hf_hub_url(file.repo, file.path), token=token or None).size or 0
    there = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE:
        raise OSError(errno.ENOSPC, f"{_gigabytes(size)} are needed, {_gigabytes(free)} are free", str(there))


@contextmanager
def _explained(file: ModelFile, target: Path) -> Iterator[None]:
    """Whatever goes wrong on the way in the block, as an ``OSError`` that says what to do next."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        what = _explanation(error, file, f"or fetch {file.path} by hand from {file.page} and put it into {target}")
        raise OSError(f"{file.title} ({file.path} of {file.repo}) {what}.") from error


def _explanation(error: Exception, file: ModelFile, by_hand: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and (file.gated or "gated" in type(error).__name__.lower()):
        return f"is behind a licence: accept it at {file.page}, run `hf auth login` or set HF_TOKEN, and try again"
    if status in (401, 403):
        return f"was refused ({status}): check HF_TOKEN or run `hf auth login`, {by_hand}"
    if status == 404:
        return f"is not at {file.page} any more: see whether it has moved there, {by_hand}"
    if status is not None:
        return f"could not be had (the hub says {status}): try again later, {by_hand}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return f"cannot be written to {error.filename or 'the disk'} ({error.strerror}): make room there and try again"
    if "Consistency check" in str(error) or type(error).__name__ in ("ChunkedEncodingError", "RemoteProtocolError"):
        return f"came cut off ({_first_line(error)}): try again, {by_hand}"
    return f"could not be reached: go online, unset HF_HUB_OFFLINE or check HF_ENDPOINT, and try again, {by_hand}"


def _reporting(progress: Progress) -> type:
    """A tqdm that tells ``progress`` instead of the terminal."""
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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
