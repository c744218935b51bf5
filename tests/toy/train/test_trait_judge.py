from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from instantcharacter.files import catalog
from toy.data.pictures import Album, draw_album
from toy.evaluate.trait_judge import DISCRETE, TraitJudge, labels_of, to_points
from toy.train import trait_judge
from toy.world import LORA_STYLE, MONSTER, Shot, draw_reference

SHOT = Shot(MONSTER, "wave", "beach", "flat", 5)


def test_pictures_become_the_pixel_art_that_code_draws():
    plain, expected = (
        torch.from_numpy(np.array(replace(SHOT, style=style).draw())).permute(2, 0, 1)[None]
        for style in ("flat", LORA_STYLE)
    )
    found = trait_judge.to_pixel_art(plain)
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (plain.int() - expected.int()).abs().max() > 50


def outputs_of(labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs that answer every question rightly; where there is no label, any."""
    known = {name: label.nan_to_num(0) for name, label in labels.items()}
    return {
        name: 20 * torch.nn.functional.one_hot(label.long(), len(DISCRETE[name])).float()
        if name in DISCRETE
        else to_points(name, label)
        for name, label in known.items()
    }


def test_the_loss_is_of_the_answers_that_a_picture_shows():
    labels = labels_of([SHOT, replace(SHOT, action="sleep", traits=replace(MONSTER, pattern="plain", hat="none"))])
    right = outputs_of(labels)
    assert trait_judge.loss_of(right, labels).item() == pytest.approx(0, abs=1e-5)
    for name in labels:
        wrong = right | {name: torch.stack([right[name][0], -right[name][1]]).requires_grad_()}
        loss = trait_judge.loss_of(wrong, labels)
        assert (loss.item() > 1) == labels[name].isfinite()[1].item(), name
        loss.backward()
        assert wrong[name].grad.isfinite().all()


@pytest.mark.slow
def test_a_judge_learns_from_the_body_of_another(tmp_path):
    draw_album(tmp_path, 2, held_out=False, seed=0, processes=1)
    album, body = Album(tmp_path), catalog.TOY_FOLDER / "judge.safetensors"
    trait_judge.train(album, tmp_path, 30, size=4, body=body)
    figures = trait_judge.check(TraitJudge.from_file(tmp_path / "trait_judge.safetensors"), album)
    assert all(figures[name] > 0.75 for name in ("shape", "hat", "body colour")), figures


def test_an_album_has_labels_in_the_order_of_its_pictures(tmp_path):
    draw_album(tmp_path, 2, held_out=True, seed=0, processes=1)
    album = Album(tmp_path)
    shots = trait_judge.shots_of(album)
    for picture, shot in zip(album.on("cpu"), shots, strict=True):
        if shot.scene:
            assert torch.equal(picture, torch.from_numpy(np.array(shot.draw())).permute(2, 0, 1))
        else:
            assert torch.equal(picture, torch.from_numpy(np.array(draw_reference(shot.traits))).permute(2, 0, 1))
    assert sum(not shot.scene for shot in shots) == 2
