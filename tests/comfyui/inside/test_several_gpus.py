"""FLUX on the second of two GPUs, ComfyUI's own device being the first: as multi-GPU packs load it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import comfy.sd
import pytest
import torch
from support import recorded
from support.comfyui_sampling import conditioning, sample
from support.pretended_cuda import CPU, PretendedCuda

from instantcharacter import InstantCharacterPipeline, Strength
from instantcharacter.comfyui import sampling_state
from instantcharacter.comfyui.conditioning import CharacterConditioning
from instantcharacter.comfyui.hosting import HostedCharacter, load, to_patcher
from instantcharacter.comfyui.init_image import InitImage, Prompt
from instantcharacter.comfyui.internals import loaded_models
from instantcharacter.comfyui.model_patch import apply
from instantcharacter.comfyui.nodes.loaders import FluxLoader
from instantcharacter.comfyui.sampler import HostedPipeline
from instantcharacter.offload.planning import STRATEGIES

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def comfyui_on_the_first(no_races) -> Iterator[None]:
    with torch.cuda.device(FIRST):
        yield
    PretendedCuda.current.contexts.clear()  # of the first GPU, which ComfyUI synchronizes


@contextmanager
def nothing_on(device: torch.device) -> Iterator[None]:
    """Context manager in which no byte and no stream comes to a GPU."""
    gpu = PretendedCuda.current.gpus[device.index]
    gpu.peak, streams = gpu.allocated, list(gpu.streams)
    before = gpu.peak
    yield
    assert gpu.peak == before
    assert gpu.streams == streams


def load_model(device: torch.device):
    """The recorded FLUX as a MODEL of a device."""
    with torch.cuda.device(device):
        model = comfy.sd.load_diffusion_model_state_dict(recorded.transformer().state_dict())
    assert model.load_device == device
    return model


def select_model():
    """The MODEL that ComfyUI's node Select Model Device moves to the second GPU."""
    from comfy_extras.nodes_multigpu import SelectModelDeviceNode

    model = load_model(FIRST)
    model.cached_patcher_init = load_model, (FIRST,)
    return SelectModelDeviceNode.execute(model, "gpu:1").args[0]


WAYS = {"loaded": lambda: load_model(SECOND)}
if find_spec("comfy_extras.nodes_multigpu"):  # ComfyUI 0.28's
    WAYS["selected"] = select_model


@pytest.fixture
def patch(adapter, character, other_character):
    """MODELs with two characters, one in a part of the picture, the other with a strength that changes."""
    mask = torch.zeros(64, 96)
    mask[10:50, 20:60] = 1

    def patch(model):
        one = CharacterConditioning(adapter, character, 0.9, mask=mask)
        other = CharacterConditioning(adapter, other_character, Strength(0.2, 0.5, 0.8))
        return apply(apply(model, one), other)

    return patch


# Apply


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("room", [None, 0])
def test_a_character_is_on_the_models_own_gpu(patch, monkeypatch, way, room):
    if room is not None:  # block by block
        monkeypatch.setattr(sampling_state, "free_memory_beside", lambda *_: room)
    model = WAYS[way]()
    assert model.load_device == SECOND
    with nothing_on(FIRST):
        on_second = [sample(patch(model)) for _ in range(2)]
    with nothing_on(SECOND):
        on_first = sample(patch(load_model(FIRST)))
    for latents in on_second:
        assert torch.equal(latents, on_first)


def test_models_on_several_devices_take_turns_with_one_adapter(patch):
    models = [patch(load_model(device)) for device in (FIRST, SECOND, FIRST)]
    on_cpu = models[2]
    on_cpu.load_device = on_cpu.offload_device = CPU  # as Select Model Device has it
    first = sample(models[0])
    for _ in range(2):
        with nothing_on(FIRST):
            assert torch.equal(sample(models[1]), first)
        with nothing_on(SECOND):
            assert torch.equal(sample(models[0]), first)
        with nothing_on(FIRST), nothing_on(SECOND):
            assert torch.equal(sample(on_cpu), first)


def test_flux_on_a_second_gpu_beside_the_models_own_is_refused(patch):
    """As MultiGPU CFG Split has prompts on one, and negative prompts on the other."""
    model = patch(load_model(SECOND))

    def elsewhere(apply_model, call):
        model.model.to(FIRST)
        return apply_model(call["input"].to(FIRST), call["timestep"].to(FIRST), **call["c"])

    model.set_model_unet_function_wrapper(elsewhere)
    with pytest.raises(RuntimeError, match="FLUX runs on cuda:0 too, and the character is on cuda:1 alone: remove"):
        sample(model)


# The Sampler


def pipe(device: torch.device, strategy: str = "auto") -> HostedPipeline:
    with torch.cuda.device(device):
        return HostedPipeline(InstantCharacterPipeline(**recorded.components()), strategy)


def generate(hosted: HostedPipeline, who: HostedCharacter, **settings) -> torch.Tensor:
    prompt = [[conditioning()[0][0], {"pooled_output": conditioning()[0][1]["pooled_output"]}]]
    return hosted.generate(who, Prompt(prompt), (96, 64), 3, 7, **settings).samples


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("init", [None, InitImage(0.6, image=torch.full((1, 64, 96, 3), 0.3))])
def test_a_pipeline_stays_on_the_gpu_that_it_was_made_on(adapter, character, strategy, init):
    who = HostedCharacter(character, adapter)
    with nothing_on(FIRST):
        on_second = generate(pipe(SECOND, strategy), who, init=init)
    with nothing_on(SECOND):
        on_first = generate(pipe(FIRST, strategy), who, init=init)
    assert torch.equal(on_second, on_first)


def test_a_pipeline_unloads_no_model_of_another_gpu(adapter, character):
    other = to_patcher(torch.nn.Linear(8, 8))
    load(other)
    generate(pipe(SECOND), HostedCharacter(character, adapter))
    assert other in [loaded.model for loaded in loaded_models()]


def test_another_gpu_is_another_pipeline():
    settings = {"clip_l": "none", "t5": "none", "vae": "none", "weight_dtype": "default", "offload": "auto"}
    node, pipes = FluxLoader(), []
    for device in (FIRST, SECOND):
        with torch.cuda.device(device):
            pipes.append([node.run("toy", **settings).args[0].hosted for _ in range(2)])
    (first, again), (second, _) = pipes
    assert first is again
    assert first is not second
