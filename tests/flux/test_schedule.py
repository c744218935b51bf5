from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from instantcharacter import Character, Strength
from instantcharacter.flux.latents import img_ids
from instantcharacter.flux.schedule import (
    Conditioning,
    add_conditionings,
    check_window,
    pair_subjects,
    schedule_subjects,
    step_window,
    token_mask,
)

FOX, HARE = (Character(torch.full((1, 2, 3), float(i)), "") for i in range(2))
IDS = img_ids(2, 4)


def tokens_of(character, timesteps, device, dtype):
    """A token that says which character and timestep it is of."""
    return [character.fused[:, :1].to(device, dtype) + timestep for timestep in timesteps]


def test_one_scale_and_mask_are_for_all_characters():
    assert pair_subjects([FOX, HARE], 0.5, None) == [(FOX, 0.5, None), (HARE, 0.5, None)]
    assert pair_subjects((FOX, HARE), (0.1, 0.2), ["left", None]) == [(FOX, 0.1, "left"), (HARE, 0.2, None)]
    assert pair_subjects(FOX, 1, "left") == [(FOX, 1, "left")]
    assert pair_subjects(None, 0.9, None) == []
    falls = Strength(1.2, 0.9, 0.6)
    assert pair_subjects([FOX, HARE], [falls, 0.5], None) == [(FOX, falls, None), (HARE, 0.5, None)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FOX, float("nan"), None), "finite"),
        (([], 1, None), "empty"),
        (([FOX, None], 1, None), "None in it"),
        ((FOX, [1, 1], None), "2 subject_scale for 1 characters"),
        (([FOX, HARE, FOX], 1, [None, None]), "2 subject_mask for 3 characters"),
    ],
)
def test_arguments_that_do_not_pair_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pair_subjects(*arguments)


@pytest.mark.parametrize("window", [(-0.1, 1), (0.6, 0.5), (0, 1.1), (float("nan"), 1)])
def test_windows_outside_of_the_run_are_refused(window):
    with pytest.raises(ValueError, match="0 ≤ start ≤ end ≤ 1"):
        check_window(*window)


@pytest.mark.parametrize(
    ("run", "window", "expected"),
    [
        ((4, 0), (0, 1), [0, 1, 2, 3]),
        ((4, 0), (0.25, 0.75), [1, 2]),
        ((4, 0), (0.3, 0.7), []),
        ((8, 4), (0.5, 1), [6, 7]),
        ((1, 0), (0, 0.5), []),
    ],
)
def test_a_step_takes_part_if_it_lies_wholly_in_the_window(run, window, expected):
    assert step_window(*run, *window) == expected


def test_a_mask_becomes_a_column_of_token_weights():
    mask = np.zeros((2, 4), dtype=np.uint8)
    mask[:, :2] = 255
    assert token_mask(mask, IDS)[0, :, 0].tolist() == [1, 1, 0, 0] * 2
    assert token_mask(mask, IDS[None].expand(2, -1, -1)).shape == (1, 8, 1)


def test_each_step_has_the_tokens_of_its_timestep():
    latents = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    both = [Conditioning(FOX, 0.5), Conditioning(HARE, 0.25, np.full((2, 2), 255, dtype=np.uint8))]
    subjects = schedule_subjects(both, [90.0, 60.0, 30.0], [1, 2], latents, IDS, tokens_of)
    assert [len(step) for step in subjects] == [0, 2, 2]
    assert [subject.tokens[0, 0, 0].item() for subject in subjects[1]] == [60, 61]
    assert [subject.scale.item() for subject in subjects[2]] == [0.5, 0.25]
    assert [subject.mask is None for subject in subjects[2]] == [True, False]
    assert {subject.tokens.dtype for subject in subjects[1]} == {torch.bfloat16}


@pytest.mark.parametrize(("first", "steps"), [(0, [0, 2, 3]), (2, [2, 3])])
def test_a_strength_runs_from_the_runs_first_step(first, steps):
    """A run that starts from a picture leaves out the timesteps before; a window does not move the strength."""
    latents, timesteps = torch.zeros(1, 8, 64), [90.0, 60.0, 30.0, 10.0]
    both = [Conditioning(FOX, Strength(1.25, 1.0, 0.5, single_blocks=2)), Conditioning(HARE, 0.9)]
    subjects = schedule_subjects(both, timesteps, steps, latents, IDS, tokens_of, first)
    double, single = (
        {step: scale_in(subjects[step][0]) for step in steps}
        for scale_in in (lambda each: each.scale.item(), lambda each: each.scale_in(single=True).item())
    )
    assert double == ({0: 1.25, 2: 1.0, 3: 0.75} if first == 0 else {2: 1.25, 3: 1.0})
    assert single == {step: 2 * scale for step, scale in double.items()}
    assert all(torch.equal(subjects[step][1].scale, torch.tensor(0.9)) for step in steps)


class Scheduler:
    timesteps = torch.tensor([900.0, 600.0, 300.0])
    begin_index: int | None = None
    step_index: int | None = None


class Transformer(nn.Module):
    """Returns what it is called with."""

    def forward(self, **kwargs):
        return kwargs


def test_each_call_gets_the_subjects_of_the_schedulers_step():
    transformer, scheduler, computed = Transformer(), Scheduler(), []

    def counting(character, timesteps, *where):
        computed.append(timesteps)
        return tokens_of(character, timesteps, *where)

    inputs = {"hidden_states": torch.zeros(1, 8, 64), "img_ids": IDS, "joint_attention_kwargs": {"other": 1}}
    with add_conditionings(transformer, scheduler, [Conditioning(FOX, 1.0)], (0.3, 1.0), counting):
        seen = []
        for step in (None, 0, 1, 2):
            scheduler.step_index = step
            seen.append(transformer(**inputs)["joint_attention_kwargs"])
    assert computed == [[600.0, 300.0]]
    assert [len(joint["subjects"]) for joint in seen] == [0, 0, 1, 1]
    assert [joint["subjects"][0].tokens[0, 0, 0].item() for joint in seen[2:]] == [600, 300]
    assert {(joint["other"], joint["image_tokens"]) for joint in seen} == {(1, 8)}
    assert inputs["joint_attention_kwargs"] == {"other": 1}
    assert transformer(**inputs) == inputs


def test_a_run_that_starts_from_a_picture_counts_its_own_steps():
    transformer, scheduler = Transformer(), Scheduler()
    scheduler.begin_index = 1
    inputs = {"hidden_states": torch.zeros(1, 8, 64), "img_ids": IDS}
    with add_conditionings(transformer, scheduler, [Conditioning(FOX, 1.0)], (0.0, 0.5), tokens_of):
        first = transformer(**inputs)["joint_attention_kwargs"]["subjects"]
        scheduler.step_index = 2
        second = transformer(**inputs)["joint_attention_kwargs"]["subjects"]
    assert first[0].tokens[0, 0, 0].item() == 600
    assert second == []
