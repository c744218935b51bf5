"""The saved characters over HTTP, for the gallery in ``web/js``: a list, thumbnails, deletion."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from io import BytesIO
from typing import Any

from .folders import deletable_character, listed, listed_character

ROUTE = "/instantcharacter/characters"


def register_routes() -> None:
    """Add the routes to ComfyUI's server.

    ``GET ROUTE`` answers with :func:`characters`. ``GET ROUTE/thumbnail?name=…`` answers with a PNG. ``DELETE
    ROUTE?name=…`` deletes a character. Errors are ``{"error": "a sentence"}``.
    """
    from server import PromptServer

    routes = PromptServer.instance.routes

    @routes.get(ROUTE)
    async def get_characters(request: Any) -> Any:
        return await _answer(characters)

    @routes.get(f"{ROUTE}/thumbnail")
    async def get_thumbnail(request: Any) -> Any:
        return await _answer(thumbnail, request.query.get("name", ""))

    @routes.delete(ROUTE)
    async def delete_character(request: Any) -> Any:
        return await _answer(delete, request.query.get("name", ""))


def characters() -> list[dict[str, Any]]:
    """The characters in Load Character's list: ``name``, the fingerprint of the ``adapter``, ``has_thumbnail``."""
    from ..model.character import summary

    found = []
    for name in listed("characters"):
        try:
            read = summary(listed_character(name))
        except OSError:  # it was removed, or may not be read
            continue
        if read is not None:
            found.append({"name": name, "adapter": read.fingerprint, "has_thumbnail": read.has_thumbnail})
    return found


def thumbnail(name: str) -> bytes:
    """The thumbnail of a listed character, as a PNG.

    Raises:
        FileNotFoundError: no such character is listed, or it has no thumbnail.
        ValueError: the file is not a character.
    """
    from ..model.character import Character

    picture = Character.load(listed_character(name)).thumbnail
    if picture is None:
        raise FileNotFoundError(f"{name} was saved without a thumbnail")
    picture.save(png := BytesIO(), "PNG")
    return png.getvalue()


def delete(name: str) -> dict[str, str]:
    """Delete a character's file, see :func:`~.folders.deletable_character`: its name as ``deleted``."""
    deletable_character(name).unlink()
    return {"deleted": name}


async def _answer(function: Callable[..., Any], *arguments: str) -> Any:
    """The response with what a function returns, in a thread, or with its error."""
    from aiohttp import web

    try:
        content = await asyncio.to_thread(function, *arguments)
    except (OSError, ValueError) as error:
        status = {FileNotFoundError: 404, PermissionError: 403, ValueError: 400}.get(type(error), 500)
        return web.json_response({"error": str(error)}, status=status)
    if isinstance(content, bytes):
        return web.Response(body=content, content_type="image/png", headers={"Cache-Control": "no-cache"})
    return web.json_response(content)
