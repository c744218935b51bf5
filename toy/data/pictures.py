"""An album: pictures of the toy world in one file that every training maps into memory.

``python -m toy.data.pictures FOLDER --characters 10000`` draws one: each character as a reference, in four shots alone,
and in one with the next character as its companion. ``--held-out`` draws characters for testing.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toy.world import SIDE, Shot, Traits, draw_reference, random_shot, random_traits

SHOTS = 4
"""Pictures of one character alone, beside its reference."""


class Album:
    """Characters, each as a reference and in shots; they follow from the seed, the pictures are in the folder.

    Attributes:
        characters: their traits.
        shots: [characters][SHOTS + 1], the last one with the next character as its companion.
        pictures: [characters, 1 + SHOTS + 1, 3, 256, 256] in uint8, the reference first.
    """

    def __init__(self, folder: Path) -> None:
        count, held_out, seed = (folder / "album.txt").read_text().split()
        self.characters, self.shots = random_characters(int(count), held_out == "True", int(seed))
        pixels = np.memmap(folder / "pictures.bin", np.uint8, "c", shape=_shape(int(count)))
        self.pictures = torch.from_numpy(pixels)

    def on(self, device: str | torch.device) -> Tensor:
        """All pictures with one character on a device, [characters · (1 + SHOTS), 3, 256, 256] in uint8."""
        return self.pictures[:, : 1 + SHOTS].flatten(0, 1).to(device)


def draw_album(folder: Path, count: int, held_out: bool, seed: int, processes: int | None = None) -> None:
    """Draw an album of ``count`` characters."""
    folder.mkdir(parents=True, exist_ok=True)
    characters, shots = random_characters(count, held_out, seed)
    pixels = np.memmap(folder / "pictures.bin", np.uint8, "w+", shape=_shape(count))
    with Pool(processes) as pool:
        for i, pictures in enumerate(pool.imap(_draw_character, zip(characters, shots), chunksize=16)):
            pixels[i] = pictures
    pixels.flush()
    (folder / "album.txt").write_text(f"{count} {held_out} {seed}")


def random_characters(count: int, held_out: bool, seed: int) -> tuple[list[Traits], list[list[Shot]]]:
    """An album's characters and their shots."""
    rng = random.Random(f"{seed} {held_out}")
    characters = [random_traits(rng, held_out) for _ in range(count)]
    shots = [[random_shot(rng, traits) for _ in range(SHOTS + 1)] for traits in characters]
    for row, companion in zip(shots, characters[1:] + characters[:1]):
        row[-1] = replace(row[-1], companion=companion)
    return characters, shots


def to_floats(pictures: Tensor) -> Tensor:
    """uint8 pictures as floats from -1 to 1."""
    return pictures.float() / 127.5 - 1


def crop(pictures: Tensor, smallest: float, side: int) -> Tensor:
    """A random part of each uint8 picture, ``smallest`` to 1 of its side, some mirrored: [B, 3, side, side], 0 to 1."""
    count, device = len(pictures), pictures.device
    size = torch.empty(count, device=device).uniform_(smallest, 1)
    flip = torch.randint(0, 2, (count,), device=device) * 2 - 1
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = size * flip, size
    theta[:, :, 2] = (torch.rand(count, 2, device=device) * 2 - 1) * (1 - size)[:, None]
    grid = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
    return F.grid_sample(pictures.float() / 255, grid, padding_mode="border", align_corners=False)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of ``size`` random indices below ``count``."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (size,), generator=generator)


def _draw_character(character: tuple[Traits, list[Shot]]) -> np.ndarray:
    traits, shots = character
    pictures = [draw_reference(traits), *(shot.draw() for shot in shots)]
    return np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)


def _shape(count: int) -> tuple[int, ...]:
    return (count, 1 + SHOTS + 1, 3, SIDE, SIDE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--characters", type=int, default=10_000)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    draw_album(options.folder, options.characters, options.held_out, options.seed, options.processes)
