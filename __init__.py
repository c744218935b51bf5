"""InstantCharacter for ComfyUI: the entry point. Nothing here is loaded before ComfyUI asks for the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "web"
REQUIRED_COMFYUI = (0, 17)


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI once, when it loads the pack.

    Raises:
        RuntimeError: a ComfyUI older than the patch points that the pack is built on.
    """
    _check_comfyui()
    from .instantcharacter import comfy_folders
    from .nodes import InstantCharacterExtension

    comfy_folders.register()
    return InstantCharacterExtension()


def _check_comfyui() -> None:
    from comfyui_version import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < REQUIRED_COMFYUI:
        needed = ".".join(map(str, REQUIRED_COMFYUI))
        raise RuntimeError(f"InstantCharacter needs ComfyUI {needed} or newer, this is {__version__}: update ComfyUI")
