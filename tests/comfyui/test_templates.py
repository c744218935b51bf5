"""What the template browser shows: each shipped workflow's picture, note, layout, and the files that it names."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image
from support import workflows
from support.workflows import SHIPPED

from instantcharacter.files import catalog

TEMPLATES = sorted(SHIPPED.glob("*.json"))
TITLE = 30
"""Height of a node's title, above its position."""
SLOT = 20
"""Distance between a node's inputs or outputs."""
CLEARANCE = 20
"""Pixels between a wire and a node that it passes."""
OF_OURS = {
    "InstantCharacterEncoderLoader": ("siglip", "dinov2"),
    "InstantCharacterAdapterLoader": ("adapter",),
    "InstantCharacterFluxLoader": ("flux", "clip_l", "t5", "vae"),
}
"""The files of the catalogue that our loaders' first lists offer."""
Box = tuple[float, float, float, float]

each_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)


def nodes_of(path: Path) -> dict[int, dict]:
    return {node["id"]: node for node in workflows.read(path)["nodes"]}


def test_names_sort_and_the_first_needs_no_gpu():
    assert [path.stem[:3] for path in TEMPLATES] == [f"{i:02}_" for i in range(1, len(TEMPLATES) + 1)]
    assert "any_machine" in TEMPLATES[0].stem


@each_template
def test_template_has_a_small_picture(path):
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size <= 40_000
    with Image.open(picture) as image:
        image.load()
        assert (image.format, image.size, image.mode) == ("JPEG", (400, 400), "RGB")
        assert len(image.getcolors(2**18)) > 1000


def test_every_picture_belongs_to_a_template():
    assert {path.stem for path in SHIPPED.glob("*.jpg")} == {path.stem for path in TEMPLATES}


@each_template
def test_template_has_a_note_of_three_sentences_that_names_only_templates(path):
    english, _ = workflows.note(path)
    assert len(re.findall(r"[.?!](?=\s|$)", english)) == len(english.split("\n\n")) == 3
    assert set(re.findall(r"\d\d_\w+", english)) <= {other.stem for other in TEMPLATES} - {path.stem}


# Layout


def box(node: dict) -> Box:
    """Left, top, right and bottom, with the title."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def crosses(start: tuple[float, float], end: tuple[float, float], box: Box) -> bool:
    """Whether the straight line between two points runs through a box that is :data:`CLEARANCE` higher and lower."""
    enters, leaves = 0.0, 1.0
    spans = (box[0], box[2]), (box[1] - CLEARANCE, box[3] + CLEARANCE)
    for first, last, (low, high) in zip(start, end, spans):
        if first == last:
            if not low < first < high:
                return False
            continue
        near, far = sorted(((low - first) / (last - first), (high - first) / (last - first)))
        enters, leaves = max(enters, near), min(leaves, far)
    return enters < leaves


@pytest.mark.parametrize(
    ("end", "expected"), [((10, 0), True), ((10, 39), True), ((10, 100), False), ((2, 0), False), ((3.5, -30), False)]
)
def test_a_line_through_a_box_is_found(end, expected):
    assert crosses((0, 0), end, (4, -5, 6, 5)) is expected


@each_template
def test_nodes_do_not_overlap(path):
    nodes = nodes_of(path).values()
    assert [(a["id"], b["id"]) for a, b in combinations(nodes, 2) if overlap(box(a), box(b))] == []


@each_template
def test_wires_go_to_the_right_and_behind_no_node(path):
    nodes, behind = nodes_of(path), []
    for _, origin, output, target, place, kind in workflows.read(path)["links"]:
        left, right = nodes[origin], nodes[target]
        start = left["pos"][0] + left["size"][0], left["pos"][1] + SLOT * (output + 0.5)
        end = right["pos"][0], right["pos"][1] + SLOT * (place + 0.5)
        assert start[0] < end[0], f"{kind} from {origin} to {target} goes back"
        others = [node for number, node in nodes.items() if number not in (origin, target)]
        behind += [(kind, origin, target, node["id"]) for node in others if crosses(start, end, box(node))]
    assert behind == []


# Models that the page offers to download


def model_names(node: dict) -> set[str]:
    """The files that a node's lists name."""
    values = node.get("widgets_values") or []
    return {value for value in values if isinstance(value, str) and re.search(r"\.(safetensors|gguf|bin)$", value)}


@each_template
def test_every_model_file_has_an_address_and_a_folder(path):
    for node in nodes_of(path).values():
        if node["type"] == "InstantCharacterLoadCharacter":
            continue  # the user's own file
        models = node["properties"].get("models", [])
        assert model_names(node) <= {model["name"] for model in models}
        for model in models:
            assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+", model["url"])
            assert model["directory"] == model["directory"].strip("/") != ""


@each_template
def test_our_loaders_have_the_catalogues_files(path):
    for node in nodes_of(path).values():
        lists = dict(zip(OF_OURS.get(node["type"], ()), node.get("widgets_values") or []))
        files = [catalog.FILES[name] for name, choice in lists.items() if choice == "download"]
        expected = [(file.saved_as.as_posix(), f"{file.page}/resolve/main/{file.path}", file.folder) for file in files]
        models = node["properties"].get("models", [])
        if lists:
            assert [(model["name"], model["url"], model["directory"]) for model in models] == expected
