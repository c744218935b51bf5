"""``index.html``: a page of a job's pictures that opens from the disk and loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..files.atomic import atomic_write

STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 24px; }
main { display: grid; gap: 24px; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); align-items: start; }
figure { margin: 0; }
img { width: 100%; height: auto; border-radius: 6px; background: #8883; }
figcaption p { margin: 4px 0; overflow-wrap: anywhere; }
small { opacity: 0.7; }
li { overflow-wrap: anywhere; }
"""


def write_page(folder: Path, entries: Sequence[Mapping[str, Any]], total: int) -> None:
    """Write the page of a job.

    Args:
        folder: the job's output folder.
        entries: of :meth:`~.folder.OutputFolder.entries`.
        total: how many pictures the job has.
    """
    failed = [entry for entry in entries if "error" in entry]
    pictures = [entry for entry in entries if "error" not in entry]
    title = f"{len(pictures)} of {total} pictures"
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>',
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n<h1>{title}</h1>',
    ]
    if failed:
        texts = (f"line {entry['line']}, {entry['output']}: {entry['error']}" for entry in failed)
        parts += ["<h2>Failed</h2>\n<ul>", *(f"<li>{escape(text)}</li>" for text in texts), "</ul>"]
    parts += ["<main>", *map(_figure, pictures), "</main>\n</html>\n"]
    with atomic_write(folder / "index.html") as partial:
        partial.write_text("\n".join(parts), encoding="utf-8")


def _figure(entry: Mapping[str, Any]) -> str:
    address, (width, height) = escape(quote(entry["output"])), entry["size"].split("x")
    details = {
        "characters": ", ".join(map(str, entry["characters"])),
        "scale": ", ".join(map(str, entry["scale"])),
        **{name: entry[name] for name in ("seed", "size", "steps", "guidance")},
        **{name: entry[name] for name in ("negative_prompt", "true_cfg") if name in entry},
        **({"lora": ", ".join(entry["lora"])} if entry["lora"] else {}),
    }
    small = " · ".join(f"{escape(name.replace('_', ' '))} {escape(str(value))}" for name, value in details.items())
    return (
        f'<figure><a href="{address}"><img src="{address}" width="{width}" height="{height}" loading="lazy" alt=""></a>'
        f"<figcaption><p>{escape(entry['prompt'])}</p><small>{escape(entry['output'])} · {small}</small></figcaption>"
        "</figure>"
    )
