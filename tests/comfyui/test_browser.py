"""What a user sees: the graph page of a real ComfyUI in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import browser, help_pages, recorded, tiny_models, workflows
from support import server as comfyui

from instantcharacter import Character
from instantcharacter.files.pictures import thumbnail

REASON = comfyui.why_not() or browser.why_not()
VUE_NODES = "Comfy.VueNodes.Enabled"
SMALL = {"EmptySD3LatentImage": [256, 256, 1], "KSampler": [7, "fixed", 3, 1, "euler", "simple", 1]}
STATE = """() => {
  const nodes = app.graph._nodes, node = id => app.graph.getNodeById(id);
  const whole = link => node(link.target_id)?.inputs[link.target_slot]?.link === link.id
    && node(link.origin_id)?.outputs[link.origin_slot]?.links.includes(link.id);
  const gone = widget => widget.type === 'combo' && widget.options.values?.includes?.(widget.value) === false;
  return {
    missing: nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type),
    wrong: nodes.filter(n => n.has_errors).map(n => n.title),
    nodes: nodes.length,
    links: [...app.graph.links.values()].filter(whole).length,
    gone: nodes.flatMap(n => (n.widgets ?? []).filter(gone).map(w => `${n.title}: ${w.name} is ${w.value}`)),
  };
}"""
VALUES = "[app.graph._nodes.map(n => [n.title, Object.fromEntries(n.widgets.map(w => [w.name, w.value]))])][0]"
PROMPT = """async () => Object.fromEntries(Object.entries((await app.graphToPrompt()).output).map(
  ([id, node]) => [id, [node.class_type, node.inputs]]))"""
AROUND_CHARACTER = """() => {
  const [character] = app.graph._nodes;
  for (const name of ['siglip', 'dinov2', 'adapter']) character.widgets.find(w => w.name === name).value = 'toy';
  const add = (type, values) => {
    const node = LiteGraph.createNode(type);
    for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
    app.graph.add(node);
    return node;
  };
  add('InstantCharacterExample', {name: 'monster.png'}).connect(0, character, 0);
  character.connect(0, add('InstantCharacterSaveCharacter', {name: 'from_picture'}), 0);
}"""
NODE_SIZES = "app.graph._nodes.map(n => [n.id, Math.ceil(n.size[0]), Math.ceil(n.size[1])])"
EMPTY = {"nodes": [], "links": [], "groups": [], "last_node_id": 0, "last_link_id": 0, "version": 0.4}
HELP_PICTURES = """pictures => pictures.every(picture =>
  [...document.querySelectorAll('img')].some(i => i.src.endsWith(picture) && i.naturalWidth > 0))"""

WIDGET_AT = """([type, name]) => {
  const node = app.graph._nodes.find(n => n.type === type), widget = node.widgets.find(w => w.name === name);
  const {scale, offset} = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect();
  const at = [node.pos[0] + node.size[0] / 2 + offset[0], node.pos[1] + widget.y + 10 + offset[1]];
  return [box.left + at[0] * scale, box.top + at[1] * scale];
}"""
PICTURES = "[...document.querySelectorAll('.instantcharacter-gallery img[src]')].every(i => i.naturalWidth === 256)"
NAME = "app.graph._nodes.find(n => n.type === 'InstantCharacter%sCharacter').widgets.find(w => w.name === 'name').value"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON), reason=str(REASON)),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> comfyui.Server:
    folder = tmp_path_factory.mktemp("comfyui")
    tiny_models.fill(folder)
    tiny_models.save_gguf(folder / "models/unet/flux1-dev-Q8_0.gguf")
    for name in (
        "text_encoders/clip_l.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
        "background_removal/birefnet.safetensors",
        "characters/fox.safetensors",
    ):
        (folder / "models" / name).parent.mkdir(exist_ok=True)
        (folder / "models" / name).touch()
    for name in ("shelf/moss", "shelf/old/bear"):
        save_character(folder / f"models/characters/{name}.safetensors")
    with comfyui.serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def shared_page(server) -> browser.Page:
    with browser.opened(server.url) as page:
        yield page


@pytest.fixture
def page(shared_page) -> browser.Page:
    shared_page.errors.clear()
    return shared_page


@pytest.fixture
def new_page(tmp_path) -> browser.Page:
    """Of a server that has no models and no pictures: a new user's."""
    with comfyui.serving(tmp_path, "--preview-method", "auto") as server, browser.opened(server.url) as page:
        yield page


@pytest.mark.parametrize("name", ["01_toy_any_machine", "02_toy_native_any_machine"])
def test_first_click_in_the_template_browser_leads_to_a_picture(new_page, name):
    new_page.open_template(comfyui.NAME, name)
    _, previews = new_page.run()
    assert previews > 10
    assert own_errors(new_page) == []


@pytest.mark.parametrize("path", workflows.GRAPHS, ids=lambda path: path.stem)
def test_workflow_opens_with_every_node_link_and_file(page, path):
    if "gguf" in path.stem and comfyui.gguf_pack() is None:
        pytest.skip("no ComfyUI-GGUF in that ComfyUI")
    graph = workflows.read(path)
    page.open(graph)
    state = page.page.evaluate(STATE)
    assert state == {
        "missing": [],
        "wrong": [],
        "nodes": len(graph["nodes"]),
        "links": len(graph["links"]),
        "gone": [],
    }
    assert page.errors == []
    prompt = workflows.prompt(workflows.name(path))
    queued = page.page.evaluate(PROMPT)
    assert queued == {key: [node["class_type"], node["inputs"]] for key, node in prompt.items()}


@pytest.fixture
def new_design(page) -> browser.Page:
    """A page with ComfyUI's new nodes, which are larger than the old ones."""
    page.set(VUE_NODES, True)
    yield page
    page.set(VUE_NODES, False)


@pytest.mark.parametrize("path", sorted(workflows.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_no_node_is_larger_in_the_new_design_than_its_file_says(new_design, path):
    graph = workflows.read(path)
    new_design.open(graph)
    new_design.clip()
    sizes = {number: size for number, *size in new_design.page.evaluate(NODE_SIZES)}
    assert sizes == {node["id"]: node["size"] for node in graph["nodes"]}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Character from picture", {"margin": 0.05, "siglip": "download", "dinov2": "download"}),
        ("Draw character", {"scale": 0.9, "width": 1024, "height": 1024, "seed": 123456, "steps": 28}),
    ],
)
def test_subgraph_of_the_library_becomes_a_node_with_its_values(page, name, values):
    page.open(EMPTY)
    page.add_node(name)
    ((title, widgets),) = page.page.evaluate(VALUES)
    assert title == name
    assert widgets.items() >= values.items()
    assert page.errors == []


def test_draw_character_generates(page, server):
    """With the toy: the nodes of a template from Apply to Decode, replaced by the subgraph."""
    page.open(with_subgraph(workflows.graph("toy_native_any_machine"), "Draw character"))
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in prompt.values():
        node["inputs"] |= {key: 256 for key in ("width", "height") if key in node["inputs"]}
        node["inputs"] |= {"steps": 2} if "steps" in node["inputs"] else {}
    assert [node["class_type"] for node in prompt.values()].count("InstantCharacterApply") == 1
    outputs = server.run(prompt)
    assert len(outputs["19"]["images"]) == 1


def test_character_from_picture_encodes(page, server):
    """A picture of the pack's, with the toy's encoders and adapter."""
    page.open(EMPTY)
    page.add_node("Character from picture")
    page.page.evaluate(AROUND_CHARACTER)
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    no_model = server.folder / "models/background_removal/birefnet.safetensors"  # an empty file, for the page's lists
    no_model.unlink()
    try:
        outputs = server.run(prompt)
    finally:
        no_model.touch()
    saved = server.folder / "models/characters/from_picture.safetensors"
    assert Character.load(saved).thumbnail is not None
    saved.unlink()  # the gallery's tests count the files
    assert any("kept the whole picture" in text for node in outputs.values() for text in node.get("text", ()))


def test_template_browser_has_the_workflows_and_their_pictures(server):
    shipped = sorted(workflows.SHIPPED.glob("*.json"))
    assert sorted(server.get("/workflow_templates")[comfyui.NAME]) == [path.stem for path in shipped]
    for path in shipped:
        assert server.get(f"/api/workflow_templates/{comfyui.NAME}/{path.name}") == workflows.read(path)
        picture = path.with_suffix(".jpg")
        assert server.get(f"/api/workflow_templates/{comfyui.NAME}/{picture.name}") == picture.read_bytes()


def test_native_workflow_is_queued_and_shows_its_picture(page, tmp_path):
    page.open(with_tiny_text_encoder(workflows.graph("native")))
    page.clip()  # a node's picture is loaded when the node is seen
    page.page.get_by_test_id("queue-button").click()
    page.page.wait_for_function(browser.SHOWN, timeout=120_000)
    assert page.page.evaluate("app.graph._nodes.find(n => n.type === 'SaveImage').imgs[0].naturalWidth") == 256
    assert page.page.evaluate("app.graph._nodes.find(n => n.type.endsWith('PrepareReference')).imgs.length") == 1
    page.screenshot(tmp_path / "native.png", page.clip())
    assert page.errors == []


@pytest.fixture(params=["zh", "en"])
def language(page, request) -> Iterator[str]:
    page.set("Comfy.Locale", request.param)
    yield request.param
    page.set("Comfy.Locale", "en")


def test_help_page_is_shown_in_the_pages_language(page, language):
    page.open(workflows.graph("native"))
    page.show_help("InstantCharacterApply")
    words = {"en": "Adds a character to a FLUX.1 MODEL", "zh": "把角色加到 FLUX.1 模型上"}
    assert words.pop(language) in page.page.inner_text("body")
    assert words.popitem()[1] not in page.page.inner_text("body")
    pictures = ["images/InstantCharacterApply.png", "images/not_alike.jpg"]
    page.page.wait_for_function(HELP_PICTURES, arg=pictures, timeout=10_000)


def test_pictures_of_help_pages_are_served(server):
    for page in help_pages.PAGES:
        for picture in help_pages.pictures(page.read_text(encoding="utf-8")):
            served = server.get(f"/extensions/{comfyui.NAME}/docs/{picture}")
            assert served == (help_pages.FOLDER / picture).read_bytes(), f"{page.name}: {picture}"


def test_translations_are_served(server):
    for language, name in (("en", "InstantCharacter Apply"), ("zh", "InstantCharacter 应用")):
        assert server.get("/i18n")[language]["nodeDefs"]["InstantCharacterApply"]["display_name"] == name


def with_subgraph(graph: dict, name: str) -> dict:
    """The native toy's graph with the subgraph in place of everything between loaders, Encode and Save Image."""
    blueprint = workflows.read(workflows.PACK / f"subgraphs/{name}.json")
    toy, encode, save, number = 10, 7, 19, 50
    outside = {1, 2, 4, 6, toy, encode, save}
    graph["nodes"] = [node for node in graph["nodes"] if node["id"] in outside]
    graph["nodes"].append(blueprint["nodes"][0] | {"id": number})
    links = [link for link in graph["links"] if {link[1], link[3]} <= outside]
    links += [[100 + i, toy, i, number, i, kind] for i, kind in enumerate(("MODEL", "CLIP", "VAE"))]
    links += [[103, encode, 0, number, 3, "CHARACTER"], [104, number, 0, save, 0, "IMAGE"]]
    nodes = {node["id"]: node for node in graph["nodes"]}
    for i, origin, output, target, place, _ in links:
        nodes[origin]["outputs"][output]["links"] = [link[0] for link in links if link[1:3] == [origin, output]]
        nodes[target]["inputs"][place]["link"] = i
    return graph | {
        "links": links,
        "last_link_id": 104,
        "last_node_id": number,
        "definitions": blueprint["definitions"],
    }


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_gallery_shows_chooses_and_deletes_characters(server, page, tmp_path, vue):
    save_character(server.folder / "models/characters/shelf/fox.safetensors")
    page.set(VUE_NODES, vue)
    try:
        page.open(workflows.read(comfyui.PACK / "workflows/10_load_character.json"))
        gallery = open_gallery(page, "InstantCharacterLoadCharacter", vue)
        assert gallery.locator(".choose span").all_inner_texts() == ["fox", "moss", "bear"]
        assert gallery.locator("h3").all_inner_texts() == ["shelf", "shelf/old"]
        assert set(gallery.locator("footer span").all_inner_texts()) == {"adapter 01234567"}
        page.page.wait_for_function(PICTURES)
        page.screenshot(tmp_path / "gallery.png")
        gallery.locator("[title='shelf/fox.safetensors']").click()  # saved after the page was opened
        gallery.wait_for(state="detached")
        assert page.page.evaluate(NAME % "Load") == "shelf/fox.safetensors"
        prompt = page.page.evaluate("app.graphToPrompt()")
        loaders = [node["inputs"] for node in prompt["output"].values() if "LoadCharacter" in node["class_type"]]
        assert [set(inputs) for inputs in loaders] == [{"name", "adapter"}]
        saved = [node for node in prompt["workflow"]["nodes"] if node["type"].endswith("LoadCharacter")]
        assert [node["widgets_values"] for node in saved] == [["shelf/fox.safetensors"]]

        gallery = open_gallery(page, "InstantCharacterLoadCharacter", vue)
        delete = gallery.locator("article", has_text="fox").locator(".delete")
        delete.click()
        assert (server.folder / "models/characters/shelf/fox.safetensors").is_file()
        delete.click()
        gallery.locator("[title='shelf/fox.safetensors']").wait_for(state="detached")
        assert not (server.folder / "models/characters/shelf/fox.safetensors").exists()
        page.page.keyboard.press("Escape")
        gallery.wait_for(state="detached")
        assert own_errors(page) == []
    finally:
        page.set(VUE_NODES, False)


def test_gallery_of_save_character_takes_a_name(page):
    page.open(workflows.read(comfyui.PACK / "workflows/09_save_character.json"))
    open_gallery(page, "InstantCharacterSaveCharacter").locator("[title='shelf/moss.safetensors']").click()
    assert page.page.evaluate(NAME % "Save") == "shelf/moss"
    assert own_errors(page) == []


def own_errors(page: browser.Page) -> list[str]:
    """What the page said as errors, but for hosts that cannot be reached here, which it asks long after its start."""
    return [error for error in page.errors if "ERR_NAME_NOT_RESOLVED" not in error]


def save_character(path: Path) -> None:
    Character(torch.zeros(1, 9, 80), "0123456789abcdef" * 2, thumbnail(recorded.PICTURE)).save(path)


def open_gallery(page: browser.Page, node: str, vue: bool = False) -> Any:
    """Press a node's button: the dialog, with the characters in it."""
    page.clip()
    if vue:
        page.page.locator("[data-node-id]").get_by_role("button", name="gallery").click()
    else:
        page.page.mouse.click(*page.page.evaluate(WIDGET_AT, [node, "gallery"]))
    dialog = page.page.locator(".instantcharacter-gallery")
    dialog.locator("article").first.wait_for()
    return dialog


def with_tiny_text_encoder(graph: dict) -> dict:
    """The tests' text encoder in place of ComfyUI's, which knows none so small; and a small picture."""
    loader = next(node for node in graph["nodes"] if node["type"] == "DualCLIPLoader")
    encode = next(node for node in graph["nodes"] if node["type"] == "CLIPTextEncode")
    dead = {link[0] for link in graph["links"] if link[1] == loader["id"]}
    graph["nodes"].remove(loader)
    graph["links"] = [link for link in graph["links"] if link[0] not in dead]
    encode["type"] = encode["properties"]["Node name for S&R"] = "TestTextEncode"
    encode["inputs"] = [entry for entry in encode["inputs"] if entry.get("link") not in dead]
    for node in graph["nodes"]:
        node["widgets_values"] = SMALL.get(node["type"], node.get("widgets_values"))
    return graph
