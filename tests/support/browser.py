"""Debian's Chromium on a ComfyUI page, driven by Playwright."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = (
    "window.app?.canvas?.ds && window.app.extensionManager && Object.keys(LiteGraph.registered_node_types).length > 50"
)
SHOWN = "app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0"
COUNT_PREVIEWS = """() => {
  if (!('previews' in window)) app.api.addEventListener('b_preview_with_metadata', () => window.previews++);
  window.previews = 0;
}"""
NODE_COUNT = "app.graph._nodes.length"
FIT = """(margin) => {
  const canvas = app.canvas, nodes = app.graph._nodes;
  const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1])) - 30;
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
  const width = canvas.canvas.clientWidth - margin.left - margin.right;
  const scale = Math.min(width / (right - left), (canvas.canvas.clientHeight - margin.top - 20) / (bottom - top), 1);
  canvas.ds.scale = scale;
  canvas.ds.offset[0] = margin.left / scale - left;
  canvas.ds.offset[1] = margin.top / scale - top;
  canvas.setDirty(true, true);
  return {x: margin.left, y: margin.top, width: (right - left) * scale, height: (bottom - top) * scale};
}"""


def why_not() -> str | None:
    """Why there is no browser here, if there is none."""
    if CHROMIUM is None:
        return "no chromium: apt-get install chromium"
    return None if find_spec("playwright") else "no playwright: pip install playwright"


class Page:
    """A ComfyUI page, freshly opened.

    Attributes:
        page: Playwright's.
        errors: what it said to its console as errors.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        page.wait_for_function(READY, timeout=90_000)
        page.wait_for_timeout(3000)
        page.keyboard.press("Escape")
        self.errors.clear()  # the page's own start: files of users who have none yet, hosts that cannot be reached

    def _listen(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url')})")

    def open(self, graph: dict) -> None:
        """Open a workflow, as a user drops its file on the page."""
        self.page.evaluate("(graph) => app.loadGraphData(graph)", graph)
        self.page.wait_for_timeout(1500)

    def open_template(self, pack: str, name: str) -> None:
        """Open a workflow in the template browser, by clicks."""
        self.page.get_by_role("button", name="Templates").first.click()
        self.page.get_by_text(pack).first.click()
        self.page.get_by_text(name).first.click()
        self.page.wait_for_function("app.graph._nodes.some(n => n.type === 'SaveImage')")

    def run(self) -> tuple[float, int]:
        """Press Run: seconds until Save Image shows a picture, and how many previews came before."""
        self.page.evaluate(COUNT_PREVIEWS)
        begin = time.monotonic()
        self.page.get_by_role("button", name="Run", exact=True).first.click()
        self.page.wait_for_function(SHOWN, timeout=120_000)
        return time.monotonic() - begin, self.page.evaluate("window.previews")

    def set(self, setting: str, value: object) -> None:
        """Change one of the page's settings."""
        self.page.evaluate("([id, value]) => app.extensionManager.setting.set(id, value)", [setting, value])
        self.page.wait_for_timeout(500)

    def add_node(self, words: str) -> None:
        """Add the first node that the search finds, as a user does it: double click, type, Enter."""
        count = self.page.evaluate(NODE_COUNT)
        while not self.page.evaluate("document.activeElement.tagName === 'INPUT'"):  # typed past it, keys are shortcuts
            self.page.mouse.dblclick(900, 500)
            self.page.wait_for_timeout(1500)
        self.page.keyboard.type(words, delay=20)
        self.page.get_by_text(words).first.wait_for()
        self.page.keyboard.press("Enter")
        self.page.wait_for_function(f"count => {NODE_COUNT} > count", arg=count)
        self.page.wait_for_timeout(700)
        self.page.mouse.click(900, 500)  # in newer pages the node hangs on the pointer until then
        self.page.wait_for_timeout(500)

    def clip(self) -> dict[str, float]:
        """Zoom so that the whole graph is seen; where on the page it is."""
        clip = self.page.evaluate(FIT, {"left": 80, "top": 130, "right": 40})
        self.page.wait_for_timeout(800)
        return {"x": clip["x"] - 16, "y": clip["y"] - 16, "width": clip["width"] + 32, "height": clip["height"] + 32}

    def show_help(self, node: str) -> None:
        """Select a node of a class and press the info button above it."""
        self.clip()
        self.page.evaluate("(type) => app.canvas.selectNode(app.graph._nodes.find(n => n.type === type))", node)
        self.page.wait_for_timeout(1000)
        self.page.get_by_test_id("info-button").click()
        self.page.wait_for_timeout(2000)

    def screenshot(self, path: Path, clip: dict[str, float] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, **({"clip": clip} if clip else {}))


@contextmanager
def opened(url: str) -> Iterator[Page]:
    """A page in a browser with a profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield Page(browser.new_context(viewport={"width": 1800, "height": 1000}).new_page(), url)
        finally:
            browser.close()
