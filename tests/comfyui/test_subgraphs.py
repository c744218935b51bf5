"""The subgraphs of ComfyUI's node library: each file is a graph of one node, with its definition beside it."""

from __future__ import annotations

from uuid import UUID

import pytest
from support import workflows

SUBGRAPHS = sorted((workflows.PACK / "subgraphs").glob("*.json"))
INPUT, OUTPUT = -10, -20
"""The ids of a definition's own inputs and outputs, as ComfyUI writes them."""

each_subgraph = pytest.mark.parametrize("path", SUBGRAPHS, ids=lambda path: path.stem)


def opened(path) -> tuple[dict, dict]:
    """The one node, and its definition."""
    graph = workflows.read(path)
    (node,), (definition,) = graph["nodes"], graph["definitions"]["subgraphs"]
    return node, definition


def test_the_pack_has_both_subgraphs():
    assert [path.stem for path in SUBGRAPHS] == ["Character from picture", "Draw character"]


@each_subgraph
def test_the_node_is_an_instance_of_its_definition(path):
    node, definition = opened(path)
    assert node["type"] == str(UUID(definition["id"])) == definition["id"]
    assert path.stem == definition["name"] == node["title"]
    for side in ("inputs", "outputs"):
        kinds = [[(slot["name"], slot["type"]) for slot in owner[side]] for owner in (node, definition)]
        assert kinds[0] == kinds[1]
        assert all(str(UUID(slot["id"])) == slot["id"] for slot in definition[side])
    assert workflows.read(path)["extra"]["BlueprintDescription"] == definition["description"]


@each_subgraph
def test_every_link_ends_in_a_slot_that_knows_it(path):
    _, definition = opened(path)
    nodes = {node["id"]: node for node in definition["nodes"]}
    for link in definition["links"]:
        if link["origin_id"] == INPUT:
            origin = definition["inputs"][link["origin_slot"]]
            assert link["id"] in origin["linkIds"]
        else:
            origin = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert link["id"] in origin["links"]
        if link["target_id"] == OUTPUT:
            target = definition["outputs"][link["target_slot"]]
            assert target["linkIds"] == [link["id"]]
        else:
            target = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert target["link"] == link["id"]
        assert origin["type"] == target["type"] == link["type"]
    known = {link["id"] for link in definition["links"]}
    assert {slot["link"] for node in nodes.values() for slot in node["inputs"]} - {None} == known - {
        link["id"] for link in definition["links"] if link["target_id"] == OUTPUT
    }


@each_subgraph
def test_shown_widgets_are_inputs_of_inner_nodes(path):
    node, definition = opened(path)
    inner = {str(inner["id"]): {slot["name"] for slot in inner["inputs"]} for inner in definition["nodes"]}
    shown = node["properties"]["proxyWidgets"]
    assert all(name in inner[number] for number, name in shown if name != "control_after_generate")
    assert {slot["name"] for slot in node["inputs"] if "widget" in slot} == {
        name for _, name in shown if name != "control_after_generate"
    }
