"""How long a new user waits for the first picture: a fresh ComfyUI in Chromium, from Run to the picture.

    python -m benchmarks.first_picture    # the toy's two templates, on the CPU; half a minute

ComfyUI is found as the tests find it. The server has no models and no pictures, and previews are on; the template is
opened by clicks. The first picture loads the toy's models, the second one does not.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from support import browser
from support import server as comfyui

PREVIEWS = ("--preview-method", "auto")
TEMPLATES = ("01_toy_any_machine", "02_toy_native_any_machine")


def main() -> None:
    if why := comfyui.why_not() or browser.why_not():
        sys.exit(why)
    for name in TEMPLATES:
        with (
            tempfile.TemporaryDirectory() as folder,
            comfyui.serving(Path(folder), *PREVIEWS) as server,
        ):
            version = server.get("/system_stats")["system"]["comfyui_version"]
            with browser.opened(server.url) as page:
                page.open_template(comfyui.NAME, name)
                for which in ("first", "second"):
                    page.page.evaluate("app.graph._nodes.find(n => n.type === 'SaveImage').imgs = null")
                    seconds, previews = page.run()
                    print(
                        f"{time.strftime('%Y-%m-%d')}, ComfyUI {version}, {name}, {which} picture: {seconds:.1f} s, "
                        f"{previews} previews, {len(page.errors)} errors on the console",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
