from __future__ import annotations

import colorsys
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from toy.evaluate import trait_judge
from toy.evaluate.trait_judge import COLOURS, DISCRETE, SIZES, TraitJudge, labels_of, right_traits
from toy.world import MONSTER, SIDE, Shot, draw_reference

SHOT = Shot(MONSTER, "wave", "beach", "flat", 5)
"""It shows every trait."""


def labels(**changed: str) -> dict[str, float]:
    """Those of the shot with another action, style or trait."""
    traits = {key: value for key, value in changed.items() if hasattr(MONSTER, key)}
    shot = {key: value for key, value in changed.items() if key not in traits}
    of_shot = labels_of([replace(SHOT, traits=replace(MONSTER, **traits), **shot)])
    return {name: label.item() for name, label in of_shot.items()}


def test_labels_are_what_the_world_draws():
    first = labels()
    for name in ("shape", "ears", "hat", "eyes", "pattern"):
        assert DISCRETE[name][int(first[name])] == getattr(MONSTER, name)
    assert first["body colour"] == pytest.approx(MONSTER.hue)
    red, green, blue = draw_reference(MONSTER).getpixel((SIDE // 2, round(SIDE * 0.66)))  # of the belly
    assert colorsys.rgb_to_hsv(red, green, blue)[0] == pytest.approx(first["second colour"], abs=0.01)
    assert all(DISCRETE["style"][int(labels(style=style)["style"])] == style for style in DISCRETE["style"])


@pytest.mark.parametrize(
    ("changed", "hidden"),
    [
        ({"action": "sleep"}, "eyes"),
        ({"pattern": "plain"}, "second colour"),
        ({"hat": "none"}, "hat colour"),
        ({"hat": "crown"}, "hat colour"),
    ],
)
def test_what_a_picture_does_not_show_has_no_label(changed, hidden):
    assert not any(map(math.isnan, labels().values()))
    assert [name for name, label in labels(**changed).items() if math.isnan(label)] == [hidden]


def test_colours_are_compared_around_the_circle_and_sizes_are_not():
    label = {name: torch.tensor([0.01]) for name in ("body colour", "width")}
    answer = {name: torch.tensor([0.99]) for name in label}
    assert {name: right.item() for name, right in right_traits(answer, label).items()} == {"body colour": 1, "width": 0}


def test_an_answer_that_is_not_shown_is_neither_right_nor_wrong():
    label = {"eyes": torch.tensor([1.0, torch.nan, 2.0])}
    right = right_traits({"eyes": torch.tensor([1.0, 1.0, 1.0])}, label)["eyes"]
    assert right[0] == 1 and right[1].isnan() and right[2] == 0


def test_the_rarest_value_is_the_one_that_is_missed_most_often():
    one, dots, sleepy = (float(DISCRETE["eyes"].index(value)) for value in ("one", "dots", "sleepy"))
    label = {name: torch.zeros(6) for name in DISCRETE} | {"eyes": torch.tensor([one, one, one, dots, dots, sleepy])}
    answer = label | {"eyes": torch.tensor([dots, one, dots, dots, one, sleepy])}
    assert trait_judge.rarest_value(right_traits(answer, label), label) == ("eyes: one", pytest.approx(1 / 3))


@pytest.mark.parametrize("name", [*COLOURS, *SIZES])
def test_a_number_is_the_angle_of_its_point_at_any_distance(name):
    numbers = torch.linspace(0.01, 0.99, 20)
    points = trait_judge.to_points(name, numbers)
    torch.testing.assert_close(trait_judge.to_numbers(name, 0.3 * points), numbers)
    ends = trait_judge.to_points(name, torch.tensor([0.0, 1.0]))
    assert (ends[0] - ends[1]).norm().item() == pytest.approx(0 if name in COLOURS else 2, abs=1e-5)


def test_a_saved_judge_reads_the_same(tmp_path):
    torch.manual_seed(0)
    judge, pictures = TraitJudge().half().float(), torch.rand(2, 3, 256, 256) * 2 - 1
    save_file({key: tensor.half() for key, tensor in judge.state_dict().items()}, tmp_path / "judge.safetensors")
    loaded = TraitJudge.from_file(tmp_path / "judge.safetensors")
    expected, found = judge.read(pictures), loaded.read(pictures)
    assert set(found) == {*DISCRETE, *COLOURS, *SIZES}
    assert all(torch.equal(found[name], expected[name]) for name in found)
