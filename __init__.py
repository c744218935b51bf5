"""InstantCharacter for ComfyUI: the entry point. Nothing here is loaded before ComfyUI asks for the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "web"


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI once, when it loads the pack."""
    from .instantcharacter.comfyui.folders import register
    from .nodes import InstantCharacterExtension

    register()
    return InstantCharacterExtension()
