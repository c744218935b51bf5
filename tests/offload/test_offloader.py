"""The offloader alone: modules and bytes, no pipeline."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from instantcharacter.offload import MemoryPlan, Offloader, measure, plan
from instantcharacter.offload.streaming import is_offloaded

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 8).view(1, 8)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class Controls:
    """A library that does nothing, and notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def apply(self, plan: MemoryPlan, device: torch.device) -> None:
        self.calls.append(plan.strategy)

    def undo(self) -> None:
        self.calls.append("undo")


@pytest.fixture
def components() -> dict[str, list[nn.Module]]:
    torch.manual_seed(0)
    return {"siglip": [nn.Linear(8, 8)], "transformer": [Blocks()], "vae": [nn.Linear(8, 8), nn.Linear(8, 8)]}


def offloader(components, strategy="stream", controls=None, **changes) -> Offloader:
    found = dataclasses.replace(plan(measure(components), strategy=strategy, resolution=64), **changes)
    return Offloader(found, components, CPU, controls or Controls())


def run(components) -> list[torch.Tensor]:
    return [module(X) for modules in components.values() for module in modules]


@pytest.mark.parametrize("strategy", ["none", "model", "stream", "sequential"])
def test_modules_compute_the_same_under_every_strategy(components, strategy):
    expected = run(components)
    placed = offloader(components, strategy)
    placed.apply()
    assert all(map(torch.equal, run(components), expected))
    placed.undo()
    assert all(map(torch.equal, run(components), expected))


def test_it_manages_modules_from_apply_to_undo(components):
    placed, modules = offloader(components), [module for found in components.values() for module in found]
    assert not any(map(placed.manages, modules))
    placed.apply()
    assert all(map(placed.manages, modules))
    assert not placed.manages(nn.Linear(1, 1))
    placed.undo()
    assert not any(map(placed.manages, modules))
    assert not any(map(is_offloaded, modules))


def test_the_library_offloads_its_own_models_only(components):
    controls = Controls()
    placed = offloader(components, "model", controls)
    placed.apply()
    assert controls.calls == ["model"]
    assert placed.manages(components["siglip"][0])
    assert not placed.manages(components["transformer"][0])


def test_resident_modules_are_all_but_what_streams(components):
    (transformer,) = components["transformer"]
    placed = offloader(components, resident_components=frozenset({"transformer", "vae"}), streamed=(1, 2))
    assert set(placed.resident_modules()) == {
        transformer.embed, transformer.blocks[0], transformer.blocks[3], *components["vae"],
    }  # fmt: skip


def test_a_second_offloader_of_a_module_is_refused_and_moves_nothing(components):
    first, controls = offloader(components), Controls()
    first.apply()
    before = [parameter.data_ptr() for parameter in components["transformer"][0].parameters()]
    second = offloader(components, controls=controls)
    with pytest.raises(RuntimeError, match="offloaded already, by another pipeline"):
        second.apply()
    assert controls.calls == []
    assert [parameter.data_ptr() for parameter in components["transformer"][0].parameters()] == before
    assert first.manages(components["transformer"][0])


def test_another_offloader_takes_over_with_the_host_memory_of_the_first(components):
    first = offloader(components)
    first.apply()
    before = [parameter.data_ptr() for parameter in components["siglip"][0].parameters()]
    first.undo()
    second = Offloader(first.plan, components, CPU, Controls(), first.host_weights)
    second.apply()
    assert [parameter.data_ptr() for parameter in components["siglip"][0].parameters()] == before
    assert second.manages(components["siglip"][0])


def test_larger_pictures_take_another_plan_and_smaller_ones_the_first(components):
    fitting = plan(measure(components), strategy="none", resolution=64)
    room = int(fitting.predicted_peak * 1.1 / 0.97) + 2**28
    placed = offloader(components, "none", vram_bytes=room)
    placed.apply()
    placed.prepare((4096, 4096), 1)
    assert placed.plan.resident < fitting.resident
    placed.prepare((64, 64), 1)
    assert placed.plan.resident == fitting.resident


def test_memory_is_reduced_once_for_a_picture(components):
    placed = offloader(components, "none")
    placed.apply()
    before = placed.plan.predicted_peak
    placed.reduce_memory("out of memory")
    assert placed.plan.predicted_peak < before
    with pytest.raises(torch.OutOfMemoryError, match=r"Draw smaller or fewer.*\(still out of memory\)"):
        placed.reduce_memory("still out of memory\nwith details")
    placed.prepare((64, 64), 1)
    placed.reduce_memory("out of memory")


def test_a_failure_while_weights_are_placed_leaves_the_modules_alone(components, monkeypatch):
    """Hooks of half a plan stayed, and every later run failed."""
    expected, controls = run(components), Controls()

    def fail(plan, device):
        raise KeyboardInterrupt

    monkeypatch.setattr(controls, "apply", fail)
    with pytest.raises(KeyboardInterrupt):
        offloader(components, controls=controls).apply()
    for modules in components.values():
        assert not any(is_offloaded(part) or part._forward_hooks for module in modules for part in module.modules())
    assert all(map(torch.equal, run(components), expected))


def test_out_of_memory_while_weights_are_placed_takes_a_smaller_plan(components, monkeypatch):
    controls, placed = Controls(), []

    def fail_first(plan, device):
        placed.append(plan)
        if len(placed) == 1:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(controls, "apply", fail_first)
    offload = offloader(components, "none", controls)
    offload.apply()
    assert len(placed) == 2
    assert offload.plan == placed[1]
    assert placed[1].predicted_peak < placed[0].predicted_peak


def test_modules_are_freed_with_the_offloader_without_a_garbage_collection(components):
    placed = offloader(components)
    placed.apply()
    gone = weakref.ref(components["transformer"][0])
    gc.disable()
    try:
        components.clear()
        del placed
        assert gone() is None
    finally:
        gc.enable()
