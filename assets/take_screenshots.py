"""Takes the pictures of nodes and graphs in ``assets/`` and ``web/docs/images``, in a real ComfyUI.

    PYTHONPATH=tests .venv/bin/python -m assets.take_screenshots

``tests/support/server.py`` and ``browser.py`` say where ComfyUI and the browser have to be.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch
from support import browser, recorded, tiny_models, workflows
from support import server as comfyui

from instantcharacter import Character
from instantcharacter.files.pictures import thumbnail
from toy.world import draw_reference, random_traits

PACK = Path(__file__).parent.parent

CHARACTERS = ("fox", "moss", "owl", "friends/bear", "friends/pip", "friends/tuft", "friends/old/grub")
PLAIN_AND_SHARP = {
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
"""The page's settings for a picture of a whole graph: nothing over it, and texts at every zoom."""
SHOWN = ("self_contained", "native", "two_characters")
NODE = """([type, widgets]) => {
  app.graph.clear();
  const node = LiteGraph.createNode(type);
  for (const widget of node.widgets ?? []) if (widget.name in widgets) widget.value = widgets[widget.name];
  app.graph.add(node);
  node.setSize([Math.max(node.computeSize()[0], 330), node.computeSize()[1]]);
}"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_models.fill(folder)
        for name in CHARACTERS:
            picture = draw_reference(random_traits(random.Random(name), held_out=True))
            character = Character(torch.zeros(1, 9, 80), recorded.adapter().fingerprint(), thumbnail(picture))
            character.save(folder / f"models/characters/{name}.safetensors")
        for file in ("clip_l", "t5xxl_fp16"):
            (folder / f"models/text_encoders/{file}.safetensors").touch()
        with comfyui.serving(folder) as server:
            _graphs(server)
            _nodes(server)
            _gallery(server)


def _graphs(server: comfyui.Server) -> None:
    for name in SHOWN:
        with browser.opened(server.url) as page:
            for setting, value in PLAIN_AND_SHARP.items():
                page.set(setting, value)
            page.open(workflows.graph(name))
            page.screenshot(PACK / f"assets/{name}.png", page.clip())


def _gallery(server: comfyui.Server) -> None:
    with browser.opened(server.url) as page:
        page.page.evaluate(NODE, ["InstantCharacterLoadCharacter", {"name": "fox.safetensors"}])
        page.page.evaluate("app.graph._nodes[0].widgets.find(widget => widget.name === 'gallery').callback()")
        dialog = page.page.locator(".instantcharacter-gallery")
        dialog.locator("article").nth(len(CHARACTERS) - 1).wait_for()
        page.page.wait_for_timeout(1000)
        dialog.screenshot(path=PACK / "assets/gallery.png")


def _nodes(server: comfyui.Server) -> None:
    with browser.opened(server.url) as page:
        for help_page in sorted((PACK / "web/docs").glob("*.md")):
            page.page.evaluate(NODE, [help_page.stem, {"name": "fox"}])
            page.screenshot(PACK / f"web/docs/images/{help_page.stem}.png", page.clip())
        page.open(workflows.graph("native"))
        page.show_help("InstantCharacterApply")
        page.screenshot(PACK / "assets/help.png")


if __name__ == "__main__":
    main()
