"""The toy world's generator: what a picture is of is what its caption says, and who is in it is said nowhere."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from toy import world
from toy.world import Look, Shot

LOOK = Look("round", "pointed", "none", "dots", "plain", 0.1, 0.3, 0.4, 0.6, 0.5)
OTHER = {
    "shape": "square", "ears": "long", "hat": "cap", "eyes": "one", "pattern": "spots",
    "hue": 0.6, "paleness": 0.9, "second_hue": 0.9, "hat_hue": 0.1, "width": 1.0,
}  # fmt: skip


def changed(first, second) -> float:
    """The part of the pixels that differ to the eye."""
    return (np.abs(np.asarray(first, int) - np.asarray(second, int)).max(-1) > 16).mean()


def test_a_seed_draws_the_same_picture_again():
    shots = [world.random_shot(random.Random(3), LOOK) for _ in range(2)]
    assert shots[0] == shots[1]
    assert changed(shots[0].draw(), shots[1].draw()) == 0


@pytest.mark.parametrize("trait", OTHER)
def test_each_trait_can_be_seen(trait):
    coloured = {"hat_hue": {"hat": "cap"}, "second_hue": {"pattern": "belly"}}
    look = dataclasses.replace(LOOK, **coloured.get(trait, {}))
    other = dataclasses.replace(look, **{trait: OTHER[trait]})
    assert changed(world.draw_reference(look), world.draw_reference(other)) > 0.003


@pytest.mark.parametrize("what", ["action", "scene", "style"])
def test_each_action_scene_and_style_draws_another_picture(what):
    choices = {"action": world.ACTIONS, "scene": world.SCENES, "style": [*world.STYLES, world.LORA_STYLE]}[what]
    shot = Shot(LOOK, "wave", "beach", "flat", 5)
    pictures = [dataclasses.replace(shot, **{what: choice}).draw() for choice in choices]
    for i, picture in enumerate(pictures):
        assert picture.size == (world.SIDE, world.SIDE)
        assert all(changed(picture, other) > 0.01 for other in pictures[:i])


def test_caption_says_nothing_of_looks():
    rng, captions = random.Random(0), set()
    shot = world.random_shot(rng, LOOK)
    for held_out in (False, True) * 20:
        captions.add(dataclasses.replace(shot, look=world.random_look(rng, held_out)).caption())
    assert len(captions) == 1


def test_captions_tell_actions_scenes_and_styles_apart():
    told = [ways for _, ways in world.ACTIONS.values()], world.SCENES.values(), [*world.STYLES.values()]
    for choices in told:
        words = [way for ways in choices for way in ways]
        assert len(words) == len(set(words))
    shot = Shot(LOOK, "read", "moon", "comic", 1)
    assert shot.caption() == "a comic of a character reading a book in space, on the moon"


def test_characters_for_testing_are_not_among_those_to_learn_from():
    rng = random.Random(0)
    learned, tested = (
        {dataclasses.astuple(world.random_look(rng, held_out))[:5] for _ in range(300)} for held_out in (False, True)
    )
    assert not learned & tested
    assert len(tested) > 50


def test_every_trait_is_learned_from():
    rng = random.Random(1)
    looks = [world.random_look(rng, held_out=False) for _ in range(300)]
    for trait, choices in (("shape", world.SHAPES), ("ears", world.EARS), ("hat", world.HATS)):
        assert {getattr(look, trait) for look in looks} == set(choices)
