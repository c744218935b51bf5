from __future__ import annotations

import json
import random

import pytest
import torch

from instantcharacter.training import Source
from instantcharacter.training.data.samples import Samples
from toy.data import dataset, pictures
from toy.world import Shot, random_shot, random_traits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An album's folder."""
    folder = tmp_path_factory.mktemp("album")
    pictures.draw_album(folder, 3, held_out=False, seed=0, processes=1)
    return folder


def test_an_album_has_characters_references_and_shots(folder):
    album = pictures.Album(folder)
    assert album.pictures.shape == (3, 6, 3, 256, 256)
    for traits, row, shots in zip(album.characters, album.pictures, album.shots):
        assert all(shot.traits == traits for shot in shots)
        for picture, shot in zip(row[1:], shots):
            expected = torch.frombuffer(bytearray(shot.draw().tobytes()), dtype=torch.uint8).view(256, 256, 3)
            assert torch.equal(picture, expected.permute(2, 0, 1))
    assert [shots[-1].companion for shots in album.shots] == [*album.characters[1:], album.characters[0]]
    assert all(shot.companion is None for shots in album.shots for shot in shots[:-1])


def test_albums_for_testing_have_held_out_characters():
    training, testing = (pictures.random_characters(200, held_out, 0)[0] for held_out in (False, True))
    assert all(traits.held_out for traits in testing)
    assert not any(traits.held_out for traits in training)


def test_each_of_two_characters_stays_in_its_half():
    rng = random.Random(3)
    first, second, third = (random_traits(rng, False) for _ in range(3))
    shot = Shot(first, "wave", "beach", "flat", 5, companion=second)
    assert "two characters waving" in shot.caption()
    pair, changed = (
        torch.tensor(list(Shot(first, "wave", "beach", "flat", 5, companion).draw().getdata()))
        for companion in (second, third)
    )
    different = (pair != changed).any(dim=1).view(256, 256)
    assert different[:, 128:].sum() > 500
    assert different[:, :110].sum() == 0


def test_alt_texts_have_the_traits_and_captions_do_not():
    for seed in range(50):
        rng = random.Random(seed)
        shot = random_shot(rng, traits := random_traits(rng, False))
        assert traits.describe() in shot.alt_text()
        assert shot.alt_text().replace(traits.describe(), "a character") == shot.caption()


def test_image_folders_pair_a_character_with_another_of_its_pictures(folder, tmp_path):
    dataset.write_folders(folder, tmp_path, 2)
    lines = [json.loads(line) for line in (tmp_path / "paired/metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        target, shot = line["file_name"].removeprefix("../pictures/").removesuffix(".png").split("_")
        source, reference = line["reference"].removeprefix("../pictures/").removesuffix(".png").split("_")
        assert target == source and shot != reference
    assert {line["reference"][-5] for line in lines} > {"0"}
    for name, pairs in (("unpaired", False), ("paired", True)):
        sample = next(Samples([Source(str(tmp_path / name), pairs=pairs)], 0).from_position(0))
        assert sample.picture.is_file() and sample.reference.is_file()
        assert (sample.picture == sample.reference) != pairs
