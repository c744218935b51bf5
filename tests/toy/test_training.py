"""What the toy models learn from, and how they are measured; the models themselves are trained on a GPU."""

from __future__ import annotations

import json
import random

import pytest
import torch

from instantcharacter import CharacterAdapter
from instantcharacter.training.config import Source
from instantcharacter.training.samples import Samples
from toy import ablations, dataset, judge, models, pictures
from toy.learning import Muon, learn
from toy.world import Shot, random_look, random_shot


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    pictures.draw(folder, 3, held_out=False, seed=0, processes=1)
    return pictures.Album(folder)


def test_an_album_is_its_looks_references_and_shots(album):
    assert album.pictures.shape == (3, 6, 3, 256, 256)
    for look, row, shots in zip(album.looks, album.pictures, album.shots):
        assert all(shot.look == look for shot in shots)
        for picture, shot in zip(row[1:], shots):
            drawn = torch.frombuffer(bytearray(shot.draw().tobytes()), dtype=torch.uint8).view(256, 256, 3)
            assert torch.equal(picture, drawn.permute(2, 0, 1))
    assert [shots[-1].companion for shots in album.shots] == [*album.looks[1:], album.looks[0]]
    assert all(shot.companion is None for shots in album.shots for shot in shots[:-1])


def test_albums_for_testing_have_other_looks():
    learned, testing = (pictures._cast(200, held_out, 0)[0] for held_out in (False, True))
    assert all(look.held_out for look in testing)
    assert not any(look.held_out for look in learned)


def test_one_of_two_characters_is_in_each_half():
    rng = random.Random(3)
    one, other, third = (random_look(rng, False) for _ in range(3))
    shot = Shot(one, "wave", "beach", "flat", 5, companion=other)
    assert "two characters waving" in shot.caption()
    pair, changed = (
        torch.tensor(list(Shot(one, "wave", "beach", "flat", 5, c).draw().getdata())) for c in (other, third)
    )
    different = (pair != changed).any(dim=1).view(256, 256)
    assert different[:, 128:].sum() > 500
    assert different[:, :110].sum() == 0


def test_alt_texts_say_who_it_is_and_captions_never():
    for seed in range(50):
        rng = random.Random(seed)
        shot = random_shot(rng, look := random_look(rng, False))
        assert look.describe() in shot.alt_text()
        assert shot.alt_text().replace(look.describe(), "a character") == shot.caption()


def test_image_folders_pair_a_look_with_another_of_its_pictures(album, tmp_path):
    dataset.write(album, tmp_path, 2)
    lines = [json.loads(line) for line in (tmp_path / "paired/metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        look, shot = line["file_name"].removeprefix("../pictures/").removesuffix(".png").split("_")
        other, reference = line["reference"].removeprefix("../pictures/").removesuffix(".png").split("_")
        assert look == other and shot != reference
    assert {line["reference"][-5] for line in lines} > {"0"}
    for name, pairs in (("unpaired", False), ("paired", True)):
        sample = next(Samples([Source(str(tmp_path / name), pairs=pairs)], 0).from_position(0))
        assert sample.picture.is_file() and sample.reference.is_file()
        assert (sample.picture == sample.reference) != pairs


def test_retrieval_is_by_chance_without_and_sure_with_likeness():
    references = torch.nn.functional.normalize(torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    others = torch.nn.functional.normalize(torch.randn(4000, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    assert judge.retrieved(references, references).all()
    assert judge.retrieved(others, references).float().mean().item() == pytest.approx(1 / 16, abs=0.015)


def test_a_half_of_a_picture_is_judged_in_the_middle():
    picture = torch.arange(256.0).expand(1, 3, 256, 256)
    left, right = judge.halves(picture)
    assert left.shape == right.shape == picture.shape
    assert torch.equal(left[..., 64:192], picture[..., :128]) and torch.equal(right[..., 64:192], picture[..., 128:])
    assert not left[..., :64].any() and not right[..., 192:].any()


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("all", (1, 1, 1, 1)),
        ("SigLIP alone", (1, 0, 1, 1)),
        ("DINOv2 alone", (0, 1, 1, 1)),
        ("deep alone", (1, 1, 0, 0)),
        ("deep and shallow", (1, 1, 1, 0)),
        ("deep and tiles", (1, 1, 0, 1)),
    ],
)
def test_a_variant_gets_only_what_it_is_to_get(name, left):
    width = models.SIGLIP.hidden_size
    features = tuple(torch.ones(1, rows, 2 * width) for rows in (3, 1, 4))
    shallow, deep, tiles = ablations.VARIANTS[name].seen(features)
    found = (deep[..., :width].any(), deep[..., width:].any(), shallow.any(), tiles.any())
    assert tuple(map(int, found)) == left


def test_without_the_timestep_tokens_are_the_same_at_any():
    fused = torch.randn(1, 6, models.ADAPTER.feature_dim, generator=torch.Generator().manual_seed(0))
    for name, same in (("all", False), ("without the timestep", True)):
        adapter = ablations.VARIANTS[name].blind(CharacterAdapter(models.ADAPTER))
        early, late = (adapter.projector.resample(fused, torch.tensor([t])) for t in (900.0, 100.0))
        assert torch.equal(early, late) == same


@pytest.mark.parametrize("muon", [False, True])
def test_what_learns_learns(muon):
    """A layer finds the matrix that made its targets, by AdamW and by Muon."""
    torch.manual_seed(0)
    wanted, given = torch.randn(6, 6), torch.randn(64, 6)
    layer = torch.nn.Linear(6, 6)
    drawn = pictures.batches(64, 16, 300, seed=0)
    hidden = [layer.weight] if muon else []

    def loss(batch):
        return (layer(given[batch]).float() - given[batch] @ wanted).square().mean()

    learned = learn("test", layer, drawn, 300, loss, rate=3e-2, average=0.9, decay=0.0, hidden=hidden)
    assert (learned(given) - given @ wanted).square().mean().item() < 0.05


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_of_many_matrices_is_torchs():
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6, 6), (12, 6), (6, 12))]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in mine]
    library = torch.optim.Muon(theirs, 1e-2, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    optimizers = Muon(mine, 1e-2, weight_decay=0.02), library
    for _ in range(10):
        for one, other in zip(mine, theirs):
            one.grad, other.grad = (gradient := torch.randn_like(one)), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # ten turns of 1e-2 in bfloat16
        assert (one - other).abs().mean() < 0.05 * 1e-2


def test_muon_turns_convolutions_as_matrices():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(4, 2, 3, 3))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    for parameter in (kernel, matrix):
        Muon([parameter], 1e-2, weight_decay=0.0).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_everything_shipped_fits_25_megabytes():
    made = [models.new_vae(), models.new_flux(), models.new_clip(), models.new_t5()]
    made += [models.new_siglip(), models.new_dinov2(), judge.Judge(), CharacterAdapter(models.ADAPTER)]
    parameters = sum(parameter.numel() for model in made for parameter in model.parameters())
    assert 2 * parameters < 24.4e6  # in 16 bits; the rest is for tokenizers, configs and a LoRA
