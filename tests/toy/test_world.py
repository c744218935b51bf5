"""The toy world: captions name action, scene and style, and never the character."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from toy import world
from toy.world import Shot, Traits, traits

TRAITS = Traits("round", "pointed", "none", "dots", "plain", 0.1, 0.3, 0.4, 0.6, 0.5)
OTHER = {
    "shape": "square", "ears": "long", "hat": "cap", "eyes": "one", "pattern": "spots",
    "hue": 0.6, "paleness": 0.9, "second_hue": 0.9, "hat_hue": 0.1, "width": 1.0,
}  # fmt: skip


def changed(first, second) -> float:
    """The fraction of pixels with a visible difference."""
    return (np.abs(np.asarray(first, int) - np.asarray(second, int)).max(-1) > 16).mean()


def test_a_seed_draws_the_same_picture():
    shots = [world.random_shot(random.Random(3), TRAITS) for _ in range(2)]
    assert shots[0] == shots[1]
    assert changed(shots[0].draw(), shots[1].draw()) == 0


@pytest.mark.parametrize("trait", OTHER)
def test_each_trait_can_be_seen(trait):
    coloured = {"hat_hue": {"hat": "cap"}, "second_hue": {"pattern": "belly"}}
    first = dataclasses.replace(TRAITS, **coloured.get(trait, {}))
    second = dataclasses.replace(first, **{trait: OTHER[trait]})
    assert changed(world.draw_reference(first), world.draw_reference(second)) > 0.003


@pytest.mark.parametrize("what", ["action", "scene", "style"])
def test_each_action_scene_and_style_draws_another_picture(what):
    choices = {"action": world.ACTIONS, "scene": world.SCENES, "style": [*world.STYLES, world.LORA_STYLE]}[what]
    shot = Shot(TRAITS, "wave", "beach", "flat", 5)
    pictures = [dataclasses.replace(shot, **{what: choice}).draw() for choice in choices]
    for i, picture in enumerate(pictures):
        assert picture.size == (world.SIDE, world.SIDE)
        assert all(changed(picture, other) > 0.01 for other in pictures[:i])


def test_a_caption_has_no_traits():
    rng, captions = random.Random(0), set()
    shot = world.random_shot(rng, TRAITS)
    for held_out in (False, True) * 20:
        captions.add(dataclasses.replace(shot, traits=world.random_traits(rng, held_out)).caption())
    assert len(captions) == 1


def test_captions_distinguish_actions_scenes_and_styles():
    for choices in (world.ACTIONS.values(), world.SCENES.values(), world.STYLES.values()):
        words = [word for alternatives in choices for word in alternatives]
        assert len(words) == len(set(words))
    shot = Shot(TRAITS, "read", "moon", "comic", 1)
    assert shot.caption() == "a comic of a character reading a book in space, on the moon"


def test_held_out_combinations_are_not_in_training():
    rng = random.Random(0)
    learned, tested = (
        {dataclasses.astuple(world.random_traits(rng, held_out))[:5] for _ in range(300)} for held_out in (False, True)
    )
    assert not learned & tested
    assert len(tested) > 50


def test_training_characters_have_every_trait():
    rng = random.Random(1)
    characters = [world.random_traits(rng, held_out=False) for _ in range(300)]
    for trait, choices in (("shape", traits.SHAPES), ("ears", traits.EARS), ("hat", traits.HATS)):
        assert {getattr(character, trait) for character in characters} == set(choices)
