"""Characters on a MODEL that the node TorchCompileModel compiles. Graphs are captured, and run as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from support.comfyui_sampling import sample

from instantcharacter import Strength
from instantcharacter.comfyui.conditioning import CharacterConditioning
from instantcharacter.comfyui.model_patch import apply


@pytest.fixture
def graphs() -> list[int]:
    """The sizes of the graphs that are captured."""
    torch.compiler.reset()
    return []


@pytest.fixture
def compiled(graphs) -> Callable:
    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    def compile_(model):
        """As the node does it, but for the backend."""
        clone = model.clone(disable_dynamic=True)
        set_torch_compile_wrapper(model=clone, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict})
        return clone

    return compile_


def test_graphs_of_one_set_of_characters_do_not_serve_another(model, adapter, character, other_character, compiled):
    """ComfyUI's compiled FLUX does not look at its options again."""
    left = torch.zeros(1, 8, 12)
    left[..., :6] = 1

    def on(base, character=character, scale=0.9, **settings):
        return apply(base, CharacterConditioning(adapter, character, scale, **settings))

    cases = [
        model,
        on(model),
        on(on(model), other_character, 0.5),
        on(model, mask=left),
        on(model, end=0.5),
        on(model, scale=0.4),
        on(model, scale=Strength(1.2, 0.9, 0.6)),
        on(model, scale=Strength(0.9, 0.9, 0.9, 0.5, 1.5)),
        model,
    ]
    for case in cases:
        assert torch.equal(sample(compiled(case)), sample(case))


def test_another_step_seed_and_strength_compile_nothing_anew(model, adapter, character, compiled, graphs):
    def on(scale):
        return compiled(apply(model, CharacterConditioning(adapter, character, scale)))

    sample(on(0.9))
    captured = len(graphs)
    sample(on(0.9), seed=5)
    sample(on(0.4))
    sample(on(Strength(0.9, 0.9, 0.9, 0.5, 1.5)))
    assert len(graphs) == captured > 0
    falls = sample(on(Strength(1.2, 0.9, 0.6)))
    assert len(graphs) > captured  # of a strength that lies on the GPU
    captured = len(graphs)
    rises = sample(on(Strength(0.6, 0.9, 1.2, 0.8, 1.1)), seed=5)
    assert len(graphs) == captured
    assert not torch.equal(falls, rises)


def test_apply_before_and_after_compiling_is_the_same(model, adapter, character, compiled):
    conditioning = CharacterConditioning(adapter, character, 0.9)
    assert torch.equal(sample(apply(compiled(model), conditioning)), sample(compiled(apply(model, conditioning))))
