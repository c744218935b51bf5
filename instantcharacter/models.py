"""Which model files InstantCharacter needs, and where they come from."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

FLUX = "black-forest-labs/FLUX.1-dev"
SIGLIP = "google/siglip-so400m-patch14-384"
DINOV2 = "facebook/dinov2-giant"
ADAPTER = "tencent/InstantCharacter"
ADAPTER_FILE = "instantcharacter_ip-adapter.bin"


def adapter_file(source: str) -> Path:
    """An adapter's file: ``source`` itself if it ends like one, else fetched from that hub repository, once.

    Raises:
        OSError: the hub cannot be reached, or has no such repository or file.
    """
    if Path(source).suffix in (".bin", ".safetensors"):
        return Path(source)
    try:
        return Path(hf_hub_download(source, ADAPTER_FILE))
    except OSError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(
            f"{ADAPTER_FILE} of {source} could not be fetched ({reason}) Fetch it by hand from "
            f"https://huggingface.co/{source} and give its path."
        ) from error
