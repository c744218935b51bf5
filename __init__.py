"""InstantCharacter for ComfyUI: the entry point. It imports the nodes when ComfyUI asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "web"


async def comfy_entrypoint() -> ComfyExtension:
    """ComfyUI calls it once, when it loads the pack."""
    from .instantcharacter.comfyui.folders import register
    from .instantcharacter.comfyui.library import register_routes
    from .nodes import InstantCharacterExtension

    register()
    register_routes()
    return InstantCharacterExtension()
