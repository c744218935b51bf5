"""The prompts of a rehearsal: the shipped workflows as they are, and with changes that users make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from support import workflows
from support.server import with_tiny_text_encoder

TINY_STEPS, TINY_PART = 2, 16
"""Of a tiny picture: its steps, and the part of the shipped width and height."""
PLAIN: dict[str, Any] = {"model": ["10", 0]}
"""In the native workflow: KSampler takes FLUX as it was loaded."""


@dataclass(frozen=True)
class Prompt:
    """A workflow, changed.

    Attributes:
        name: how results call it.
        workflow: its name, as ``support.workflows`` has it.
        changes: for every node with an input of this name: a value in place of its value, a link in place of its link.
        nodes: nodes that take the place of the workflow's of the same number.
    """

    name: str
    workflow: str
    changes: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, dict] = field(default_factory=dict)

    def build(self, tiny: bool) -> dict[str, dict]:
        """The prompt as ``/prompt`` takes it."""
        prompt = workflows.prompt(self.workflow) | self.nodes
        for node in prompt.values():
            for key, value in self.changes.items():
                if key in node["inputs"] and isinstance(value, list) == isinstance(node["inputs"][key], list):
                    node["inputs"][key] = value
        return shrink(prompt) if tiny else prompt


def shrink(prompt: dict[str, dict]) -> dict[str, dict]:
    """A prompt for the tests' models: their text encoder, few steps, and pictures as small as the nodes draw them.

    Those of the toy FLUX are small already.
    """
    part = 1 if any(node["class_type"] == "InstantCharacterToy" for node in prompt.values()) else TINY_PART
    for node in prompt.values():
        inputs = node["inputs"]
        smallest = 256 if node["class_type"].startswith("InstantCharacter") else 0
        numbers = {key: inputs[key] for key in ("width", "height", "x") if isinstance(inputs.get(key), int)}
        inputs |= {key: max(number // part, smallest) for key, number in numbers.items()}
        inputs |= {"value": inputs["value"] // part} if node["class_type"] == "PrimitiveInt" else {}
        inputs |= {key: TINY_STEPS for key in ("steps", "num_inference_steps") if key in inputs}
    return with_tiny_text_encoder(prompt)


def native(name: str, **changes: Any) -> Prompt:
    return Prompt(f"native, {name}", "native", changes)


def own(name: str, **changes: Any) -> Prompt:
    return Prompt(f"self-contained, {name}", "self_contained", changes)


def native_lora(name: str, **changes: Any) -> Prompt:
    """The workflow with a GGUF file and a LoRA, without the former."""
    loader = {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}
    nodes = {"10": {"class_type": "UNETLoader", "inputs": loader}}
    return Prompt(f"native, LoRA{name}", "gguf_and_style_lora", changes, nodes)


WORKFLOWS = (
    Prompt("plain FLUX, first", "native", PLAIN | {"seed": 1}),
    Prompt("plain FLUX, next seed", "native", PLAIN | {"seed": 2}),
    native("first"),
    native("next seed", seed=2),
    own("first"),
    own("next seed", seed=2),
    native("right after self-contained", seed=3),
    own("right after native", seed=3),
    Prompt("two characters", "two_characters"),
    Prompt("save a character", "save_character", {"overwrite": True}),
    Prompt("load a character", "load_character"),
    Prompt("background removal", "background_removal", {"image": "photograph.jpg"}),
    Prompt("earlier pack's, first", "earlier_pack"),
    Prompt("earlier pack's, next seed", "earlier_pack", {"seed": 2}),
    Prompt("refined", "native_refine"),
    Prompt("toy", "toy_any_machine"),
    Prompt("toy, native", "toy_native_any_machine"),
    Prompt("toy, refined", "toy_refine_any_machine"),
)
"""Every workflow but two, with switches between the two ways. Seeds differ, since ComfyUI runs nothing twice."""
CHANGES = (
    native("next prompt", seed=4, text="the fox reads a newspaper"),
    native("another scale", seed=5, scale=0.6),
    native("photograph", seed=6, image="photograph.jpg"),
    native("painted mask", seed=7, image="painted.png"),
    Prompt("two characters, next seed", "two_characters", {"seed": 2}),
    own("next prompt", seed=4, prompt="the fox reads a newspaper"),
    own("another scale", seed=5, scale=0.6),
    own("photograph", seed=6, image="photograph.jpg"),
    own("painted mask", seed=7, image="painted.png"),
    Prompt("save a photograph's", "save_character", {"image": "photograph.jpg", "name": "photo", "overwrite": True}),
    Prompt("load a photograph's", "load_character", {"name": "photo.safetensors"}),
    Prompt("earlier pack's, photograph", "earlier_pack", {"seed": 3, "image": "photograph.jpg"}),
)
SWITCHES = (
    native("cold"),
    own("first after native"),
    *(way(f"turn {turn}", seed=10 * turn + i) for turn in range(1, 6) for i, way in enumerate((native, own))),
)
"""The two ways in turn, five times in one server: what a switch costs, and whether memory returns."""
LORA = (
    own("LoRA, first", lora="ghibli_style.safetensors"),
    own("LoRA, next seed", lora="ghibli_style.safetensors", seed=2),
    own("LoRA, another strength", lora="ghibli_style.safetensors", lora_strength=0.5, seed=3),
    own("LoRA taken away", seed=4),
    own("fp8, first", weight_dtype="fp8_e4m3fn", seed=5),
    own("fp8, next seed", weight_dtype="fp8_e4m3fn", seed=6),
    own("fp8 with a LoRA", weight_dtype="fp8_e4m3fn", lora="ghibli_style.safetensors", seed=7),
    native_lora(", first"),
    native_lora(", next seed", seed=2),
    native_lora(", another strength", seed=3, strength_model=0.5),
    Prompt("8 steps", "turbo_8_steps", {"lora_name": "ghibli_style.safetensors"}),
    native("fp8, first", weight_dtype="fp8_e4m3fn", seed=5),
    native("fp8, next seed", weight_dtype="fp8_e4m3fn", seed=6),
)
FAST = (
    own("fp8 arithmetic, first", weight_dtype="fp8_e4m3fn_fast"),
    own("fp8 arithmetic, next seed", weight_dtype="fp8_e4m3fn_fast", seed=2),
    own("fp8 arithmetic, compiled, first", weight_dtype="fp8_e4m3fn_fast", compile=True, seed=3),
    own("fp8 arithmetic, compiled, next seed", weight_dtype="fp8_e4m3fn_fast", compile=True, seed=4),
    own("fp8 arithmetic, compiled, cache", weight_dtype="fp8_e4m3fn_fast", compile=True, seed=5, cache="first_block"),
    native("fp8 arithmetic, first", weight_dtype="fp8_e4m3fn_fast", seed=6),
    native("fp8 arithmetic, next seed", weight_dtype="fp8_e4m3fn_fast", seed=7),
)
"""The fastest ways, where the GPU multiplies in 8 bits."""
COMPILED = (
    own("compiled, first", compile=True),
    own("compiled, next seed", compile=True, seed=2),
    own("compiled, next prompt", compile=True, seed=3, prompt="the fox reads a newspaper"),
    own("compiled, another scale", compile=True, seed=4, scale=0.6),
    own("compiled, photograph", compile=True, seed=5, image="photograph.jpg"),
)
FOLDERS = (
    Prompt("earlier pack's folders, first", "earlier_pack_local"),
    Prompt("earlier pack's folders, next seed", "earlier_pack_local", {"seed": 2}),
)
GGUF = (
    Prompt("GGUF and LoRA, first", "gguf_and_style_lora"),
    Prompt("GGUF and LoRA, next seed", "gguf_and_style_lora", {"seed": 2}),
    Prompt("GGUF and LoRA, another strength", "gguf_and_style_lora", {"seed": 3, "strength_model": 0.5}),
)
