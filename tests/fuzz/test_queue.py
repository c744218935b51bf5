"""Hostile inputs of every node through ComfyUI's queue, as a browser or a script posts them, to a real ComfyUI.

An input that ComfyUI's own validation refuses counts as clear; so does an error that the pack raised in its node. The
toy models are small enough that whatever is accepted runs to its end.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import server as comfyui
from support.fuzzing import LIMIT, Outcomes
from support.server import Failed, Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(comfyui.why_not()), reason=str(comfyui.why_not())),
    pytest.mark.xdist_group("comfyui"),
]
TOY = comfyui.PACK / "assets/toy"
OWN_FRAME = f"{comfyui.NAME}/instantcharacter/"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
GRAPH: dict[str, dict[str, Any]] = json.loads((comfyui.PACK / "tests/support/every_node.json").read_text("utf-8"))
"""A node of each kind, with good inputs."""
OURS = sorted(key for key, node in GRAPH.items() if node["class_type"].startswith("InstantCharacter"))
GENERATING = ("KSampler", *(f"InstantCharacter{name}" for name in ("Sampler", "Sweep", "Generate")))
"""Nodes whose pictures are of more than one colour."""
SHOWN = {"apply": "ksampler"}
"""Nodes whose output is seen in another node's."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("queue")
    for there, name in (("diffusers/toy", "flux"), ("clip_vision/siglip", "siglip"), ("clip_vision/dinov2", "dinov2")):
        shutil.copytree(TOY / name, folder / "models" / there)
    (folder / "models/ipadapter").mkdir()
    shutil.copy(TOY / "adapter.safetensors", folder / "models/ipadapter/toy.safetensors")
    (folder / "secret").mkdir()
    (folder / "models/characters").mkdir()
    (folder / "models/characters/link").symlink_to(folder / "secret")
    (folder / "models/ipadapter/link").symlink_to(folder / "secret")
    with comfyui.serving(folder) as server:
        server.run(prompt_for("save", name="one"))
        yield server


class Declared(NamedTuple):
    """An input of one of our nodes: its node in the graph, and what ``/object_info`` says of it."""

    key: str
    name: str
    kind: Any
    settings: dict[str, Any]
    optional: bool

    def __repr__(self) -> str:
        return f"{self.key}.{self.name}"


@pytest.fixture(scope="module")
def inputs(server: Server) -> Iterator[list[Declared]]:
    """Every input of every node of ours, but ``compile``, which takes minutes."""
    found = []
    for key in OURS:
        kind = GRAPH[key]["class_type"]
        sections = server.get(f"/object_info/{kind}")[kind]["input"]
        for section in ("required", "optional"):
            each = sections.get(section, {}).items()
            found += [Declared(key, name, *there[:2], section == "optional") for name, there in each]
    return [each for each in found if each.name != "compile"]


@pytest.fixture
def good_prompts(server: Server) -> Iterator[None]:
    """Good prompts give the same pictures after a test's inputs as before."""
    prompt = prompt_for("sampler") | prompt_for("apply") | prompt_for("generate")
    before = shown(server.run(prompt))
    yield
    server.post("/free", {"unload_models": True, "free_memory": True})  # nothing of it is cached
    assert shown(server.run(prompt)) == before
    assert len(before) == 3


def shown(outputs: dict[str, Any]) -> dict[str, list[Any]]:
    """By node: what the sinks of a prompt show."""
    return {key: output["shown"] for key, output in outputs.items() if "shown" in output}


def prompt_for(key: str, **inputs: Any) -> dict[str, Any]:
    """The nodes that a node of the graph needs, with some of its inputs changed, and a sink for what it gives."""
    sink = {"class_type": "TestSink", "inputs": {"value": [SHOWN.get(key, key), 0]}}
    prompt: dict[str, Any] = {f"sink of {key}": sink} if key not in ("save",) else {}
    wanted = [SHOWN.get(key, key)]
    while wanted:
        name = wanted.pop()
        if name in prompt or name not in GRAPH:
            continue
        values = GRAPH[name]["inputs"] | (inputs if name == key else {})
        prompt[name] = GRAPH[name] | {"inputs": values}
        wanted += [
            value[0]
            for value in values.values()
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        ]
    return prompt


def judge(outcomes: Outcomes, server: Server, prompt: dict[str, Any], may_be_accepted: bool) -> bool:
    """Count what becomes of a prompt; whether it ran to its end."""
    try:
        history = server.wait(server.queue(prompt), 3 * LIMIT)
    except Failed as refused:
        assert server.process.poll() is None, f"crash: {refused}"
        outcomes.count("hang" if "not done after" in str(refused) else "clear", str(refused))
        return False
    if history["status"]["status_str"] == "success":
        values = [value for values in shown(history["outputs"]).values() for value in values]
        generated = any(node["class_type"] in GENERATING for node in prompt.values())
        constant = generated and any(isinstance(value, float) and not value > 1e-4 for value in values)
        broken = constant or any(value is False or value != value for value in values)  # 0.0 equals False
        outcomes.count("right" if may_be_accepted and not broken else "wrong", json.dumps(prompt)[-2000:])
        return True
    (failure,) = (content for kind, content in history["status"]["messages"] if kind == "execution_error")
    message = failure["exception_message"]
    clear = OWN_FRAME in failure["traceback"][-1] and message.strip()
    trace = "".join(failure["traceback"][-4:]) + f"{failure['exception_type']}: {message}"
    outcomes.count("clear" if clear else "raw", f"{failure['node_type']} {trace}")
    return False


# Values in place of links and in widgets

NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 0.5, 1, 257, 1e-300, -1e308, 2**31, 2**63, 2**64, -(2**63), 10**300]
TEXTS = [
    "",
    "toy",
    "none",
    "/etc/passwd",
    "../../secret",
    "\ud800",
    "a\0b",
    "x" * 3000,
    "nan",
    "1e999",
    "\u202egnp",
    "{a|b}",
]
JSON = st.recursive(
    st.sampled_from([None, True, False, *NUMBERS, *TEXTS]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["__value__", "samples", "/etc/passwd", "image", "a"]), inner, max_size=2),
    ),
    max_leaves=4,
)


def fits(value: Any, declared: Declared) -> bool:
    """Whether a number, a text or a choice is in the range of an input."""
    if declared.kind == "COMBO":
        return value in declared.settings["options"]
    return declared.kind not in ("INT", "FLOAT") or declared.settings["min"] <= value <= declared.settings["max"]


def literal_fits(value: Any, declared: Declared) -> bool:
    """Whether ComfyUI, which converts literals, and the pack may accept one."""
    if declared.kind not in WIDGETS:
        return value is None and declared.optional
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    try:
        return fits({"INT": int, "FLOAT": float}.get(declared.kind, lambda same: same)(value), declared)
    except (TypeError, ValueError, OverflowError):
        return False


def is_link(value: Any) -> bool:
    """Whether ComfyUI takes a literal for a link, once it has validated it: to no node, which ends its worker."""
    value = value.get("__value__") if isinstance(value, dict) else value
    return isinstance(value, list) and len(value) == 2


@given(data=st.data())
def test_values_in_place_of_links_and_in_widgets(server, inputs, good_prompts, outcomes, data):
    declared, value = data.draw(st.sampled_from(inputs)), data.draw(JSON.filter(lambda value: not is_link(value)))
    judge(outcomes, server, prompt_for(declared.key, **{declared.name: value}), literal_fits(value, declared))


# Values that come through links

SHAPES = [[1, 64, 64, 3], [2, 64, 64, 4], [1, 64, 64, 1], [1, 64, 64], [3, 64, 64], [1, 8, 32, 32], [1, 16, 32, 32]]


def tensors(shapes: list[list[int]], fills: tuple[float, ...] = (0.5, 1.0, 0.0, 5.0, math.nan, math.inf)) -> Any:
    """What a test's node makes a tensor of: of one of these shapes, or any other."""
    specs = st.fixed_dictionaries(
        {
            "tensor": st.one_of(
                *map(st.sampled_from, (shapes, SHAPES)), st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 32]), max_size=5)
            ),
            "dtype": st.sampled_from(["float32", "float16", "bfloat16", "float64", "uint8", "int64", "bool"]),
            "fill": st.sampled_from(fills),
        }
    )
    return specs.filter(lambda spec: spec["dtype"] != "bool" or math.isfinite(spec["fill"]))  # a true NaN is true


PROMPT = st.tuples(
    tensors([[1, 5, 96], [2, 5, 96], [1, 5, 4096]]),
    st.fixed_dictionaries({"pooled_output": st.one_of(tensors([[1, 96], [1, 64], [1, 768]]), st.none())}),
)
LINKED = {
    "LATENT": st.fixed_dictionaries({"samples": tensors([[1, 8, 32, 32], [2, 8, 32, 32]])}),
    "CONDITIONING": st.lists(PROMPT.map(list), min_size=1, max_size=2),
    "IMAGE": tensors([[1, 64, 64, 3], [2, 64, 64, 4], [1, 64, 64, 1], [1, 1, 500, 3]]),
    "MASK": tensors([[1, 64, 64], [2, 64, 64], [64, 64], [1, 1, 64, 64]]),
}
PYTHON = {"INT": int, "FLOAT": (int, float), "STRING": str, "COMBO": str, "BOOLEAN": (bool, int)}


@given(data=st.data())
def test_values_through_links(server, inputs, good_prompts, outcomes, data):
    with_tensors = [each for each in inputs if each.kind in LINKED]
    declared = data.draw(st.one_of(*map(st.sampled_from, (with_tensors, inputs))))
    value = data.draw(st.one_of(LINKED.get(declared.kind, st.sampled_from([*NUMBERS, *TEXTS])), JSON))
    prompt = prompt_for(declared.key, **{declared.name: ["value", 0]})
    prompt["value"] = {"class_type": "TestValue", "inputs": {"json": json.dumps(value)}}
    if value is None:
        accepted = declared.optional
    elif declared.kind in LINKED:
        accepted = isinstance(value, (dict, list)) and "NaN" not in json.dumps(value) and "Inf" not in json.dumps(value)
    else:
        accepted = isinstance(value, PYTHON.get(declared.kind, ())) and fits(value, declared)
    judge(outcomes, server, prompt, accepted)


# Names

NAMES = st.one_of(
    st.sampled_from(
        [
            *(
                "CON",
                "con.txt",
                "a/NUL",
                "a:b",
                "C:\\evil",
                "fox.",
                "fox ",
                "a /b",
                "x" * 300,
                "é" * 150,
                "\udcff",
                "a\0b",
            ),
            *(
                "link/x",
                "../x",
                "/etc/x",
                "..\\x",
                "a/../../x",
                ".",
                "",
                "~/x",
                "\x1b[31m",
                "%2e%2e/x",
                "one",
                "new/fox",
            ),
            *("ipadapter/link/x", "link", "ipadapter/link", "models/ipadapter/link"),
        ]
    ),
    st.text(st.characters(), max_size=12),
)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "temp" not in path.parts and path.suffix != ".log"}


@given(name=NAMES, setting=st.sampled_from(["save", "base_model_path", "ip_adapter_path", "image_encoder_path"]))
def test_names_lead_nowhere_else(server, good_prompts, outcomes, name, setting):
    before = files(server.folder)
    if setting == "save":
        judge(outcomes, server, prompt_for("save", name=name, overwrite=True), may_be_accepted=True)
    else:
        judge(outcomes, server, prompt_for("local", **{setting: name}), may_be_accepted=False)
    added = files(server.folder) - before
    characters = server.folder / "models/characters"
    assert all(path.is_relative_to(characters) and path.suffix == ".safetensors" for path in added)
    assert not list((server.folder / "secret").iterdir())
