"""Image folders for the trainer: ``python -m toy.dataset ALBUM FOLDER --looks 8000``.

In ``FOLDER/unpaired`` a picture is its own reference; in ``FOLDER/paired`` the reference is another picture of the
character, every second time the one on white.
"""

from __future__ import annotations

import argparse
import json
from multiprocessing import Pool
from pathlib import Path

from PIL import Image

from toy.pictures import SHOTS, Album


def write(album: Album, folder: Path, count: int) -> None:
    """Write the first ``count`` characters of an album."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    with Pool(initializer=_remember, initargs=(album, pictures)) as pool:
        pool.map(_save, range(count), chunksize=16)
    unpaired, paired = [], []
    for look, shots in enumerate(album.shots[:count]):
        for i, shot in enumerate(shots[:SHOTS], 1):
            line = {"file_name": f"../pictures/{look}_{i}.png", "text": shot.caption()}
            other = 0 if i % 2 else i % SHOTS + 1
            unpaired.append(line)
            paired.append({**line, "reference": f"../pictures/{look}_{other}.png"})
    for name, lines in (("unpaired", unpaired), ("paired", paired)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def _remember(album: Album, folder: Path) -> None:
    global _album, _folder
    _album, _folder = album, folder


def _save(look: int) -> None:
    for i, picture in enumerate(_album.pictures[look, : 1 + SHOTS]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(_folder / f"{look}_{i}.png", compress_level=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("album", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--looks", type=int, default=8000)
    options = parser.parse_args()
    write(Album(options.album), options.folder, options.looks)
