"""Takes the pictures of nodes and graphs in ``assets/`` and ``web/docs/images``, in a real ComfyUI.

    PYTHONPATH=tests .venv/bin/python -m assets.take_screenshots

``tests/support/server.py`` and ``browser.py`` say where ComfyUI and the browser have to be.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from support import browser, tiny_models, workflows
from support import server as comfyui

PACK = Path(__file__).parent.parent

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
        (folder / "models/characters").mkdir()
        (folder / "models/characters/fox.safetensors").touch()
        for file in ("clip_l", "t5xxl_fp16"):
            (folder / f"models/text_encoders/{file}.safetensors").touch()
        with comfyui.serving(folder) as server:
            _graphs(server)
            _nodes(server)


def _graphs(server: comfyui.Server) -> None:
    for name in SHOWN:
        with browser.opened(server.url) as page:
            page.open(workflows.graph(name))
            page.screenshot(PACK / f"assets/{name}.png", page.clip())


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
