"""A strength at the timesteps of ComfyUI's model sampling."""

from __future__ import annotations

import pytest
import torch
from comfy.model_sampling import ModelSamplingFlux

from instantcharacter import Strength
from instantcharacter.comfyui.hosting import HostedCharacter
from instantcharacter.comfyui.model_patch import KEY
from instantcharacter.comfyui.nodes.apply import Apply
from instantcharacter.comfyui.nodes.sampler import Sampler
from instantcharacter.comfyui.nodes.strength import StrengthNode
from instantcharacter.comfyui.sampler import Generated
from instantcharacter.comfyui.strengths import Strengths, timesteps_at

CPU = torch.device("cpu")
FALLS = Strength(1.25, 1.0, 0.5, double_blocks=1, single_blocks=2)


def sampling(shift: float = 1.15) -> ModelSamplingFlux:
    made = ModelSamplingFlux()
    made.set_parameters(shift=shift)
    return made


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.15])
def test_progress_is_counted_as_comfyui_counts_percents(shift):
    strengths = Strengths(FALLS, sampling(shift), CPU, torch.float32)
    assert strengths.changes
    for percent in (0, 0.123, 0.25, 0.5, 0.75, 0.987, 1):
        timestep = timesteps_at(sampling(shift), [percent])
        assert [each.item() for each in strengths.at(timestep)] == pytest.approx(FALLS.at(percent), abs=1e-5)


def test_timesteps_beyond_the_schedule_have_the_strength_of_its_ends():
    strengths = Strengths(FALLS, sampling(), CPU, torch.float32)
    ends = [strengths.at(torch.tensor([timestep]))[0].item() for timestep in (1100.0, -1.0)]
    assert ends == [1.25, 0.5]


def test_a_schedule_with_many_knots_at_one_timestep_has_finite_strengths():
    """The node ModelSamplingFlux allows shifts of 100."""
    strengths = Strengths(FALLS, sampling(100), CPU, torch.float32)
    for timestep in (1000.0, 999.0, 0.0):
        double, single = strengths.at(torch.tensor([timestep]))
        assert 0.5 <= double <= 1.25
        assert single == 2 * double


def test_a_strength_that_changes_has_the_dtype_of_the_sampling():
    for dtype in (torch.bfloat16, torch.float32):
        values = Strengths(FALLS, sampling(), CPU, dtype).at(torch.tensor([400.0]))
        assert [(each.dtype, each.shape) for each in values] == [(dtype, torch.Size([]))] * 2


@pytest.mark.parametrize("scale", [0.9, Strength(0.9, 0.9, 0.9)])
def test_a_constant_is_exact_and_in_host_memory(scale):
    strengths = Strengths(scale, sampling(), torch.device("meta"), torch.bfloat16)
    assert not strengths.changes
    for each in strengths.at(torch.tensor([400.0])):
        assert each.device == CPU
        assert torch.equal(each, torch.tensor(0.9))


class Pipe:
    """A FLUX_PIPE that saves what it is to generate."""

    def generate(self, *args, **settings) -> Generated:
        self.settings = settings
        return Generated(torch.zeros(1, 8, 8, 3), torch.zeros(1, 16, 1, 1))


def scales(model, character: HostedCharacter, **inputs) -> list:
    """The strengths that Apply and Sampler give to a character, of a scale of 0.5."""
    (patched,) = Apply.run(model, character, 0.5, 0.0, 1.0, **inputs).args
    (conditioning,) = patched.get_attachment(KEY)
    pipe = Pipe()
    Sampler.run(pipe, "a fox", "", 1.0, 64, 64, 4, 3.5, 0, 0.5, 0.0, 1.0, 1, 1.0, character, **inputs)
    return [conditioning.scale, pipe.settings["subject_scale"]]


def test_the_nodes_strength_is_a_factor_on_scale_in_both_ways(model, adapter, character):
    who = HostedCharacter(character, adapter)
    (strength,) = StrengthNode.run(0.5, 2.0, 1.0, 0.75, 1.25).args
    assert scales(model, who, strength=strength) == [Strength(0.25, 1.0, 0.5, 0.75, 1.25)] * 2
    assert scales(model, who) == [0.5, 0.5]
