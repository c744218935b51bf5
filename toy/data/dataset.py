"""Image folders for the adapter's trainer: ``python -m toy.data.dataset ALBUM FOLDER --characters 8000``.

In ``FOLDER/unpaired`` a picture is its own reference; in ``FOLDER/paired`` the reference is another picture of the
character, every second time the one on white.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from PIL import Image

from toy.data.pictures import SHOTS, Album


def write_folders(album: Path, folder: Path, count: int) -> None:
    """Write the first ``count`` characters of an album."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        pool.map(partial(_save_pictures, album, pictures), _chunks(count))
    unpaired, paired = [], []
    for character, shots in enumerate(Album(album).shots[:count]):
        for i, shot in enumerate(shots[:SHOTS], 1):
            line = {"file_name": f"../pictures/{character}_{i}.png", "text": shot.caption()}
            reference = 0 if i % 2 else i % SHOTS + 1
            unpaired.append(line)
            paired.append({**line, "reference": f"../pictures/{character}_{reference}.png"})
    for name, lines in (("unpaired", unpaired), ("paired", paired)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def _chunks(count: int, size: int = 500) -> list[range]:
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _save_pictures(album: Path, folder: Path, characters: range) -> None:
    """Save some characters' pictures, in a process that maps the album for itself."""
    pictures = Album(album).pictures
    for character in characters:
        for i, picture in enumerate(pictures[character, : 1 + SHOTS]):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{character}_{i}.png", compress_level=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("album", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--characters", type=int, default=8000)
    options = parser.parse_args()
    write_folders(options.album, options.folder, options.characters)
