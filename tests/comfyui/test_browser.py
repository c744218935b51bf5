"""What a user sees: the graph page of a real ComfyUI in Chromium."""

from __future__ import annotations

import pytest
from support import browser, tiny_models, workflows
from support import server as comfyui

REASON = comfyui.why_not() or browser.why_not()
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
SHOWN = "app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0"
HELP_PICTURE = (
    "[...document.querySelectorAll('img')].some(i => i.src.includes('InstantCharacterApply.png') && i.naturalWidth > 0)"
)

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


@pytest.mark.parametrize("path", workflows.GRAPHS, ids=lambda path: path.stem)
def test_workflow_opens_with_every_node_link_and_file(page, path):
    if "gguf" in path.stem and comfyui.gguf_pack() is None:
        pytest.skip("no ComfyUI-GGUF in that ComfyUI")
    graph = browser.read(path)
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


def test_template_browser_has_the_workflows(server):
    assert set(server.get("/workflow_templates")[comfyui.NAME]) == {path.stem for path in GRAPHS}
    for path in GRAPHS:
        assert server.get(f"/api/workflow_templates/{comfyui.NAME}/{path.name}") == browser.read(path)


def test_native_workflow_is_queued_and_shows_its_picture(page, tmp_path):
    page.open(with_tiny_text_encoder(workflows.graph("native")))
    page.clip()  # a node's picture is loaded when the node is seen
    page.page.get_by_test_id("queue-button").click()
    page.page.wait_for_function(SHOWN, timeout=120_000)
    assert page.page.evaluate("app.graph._nodes.find(n => n.type === 'SaveImage').imgs[0].naturalWidth") == 256
    assert page.page.evaluate("app.graph._nodes.find(n => n.type.endsWith('PrepareReference')).imgs.length") == 1
    page.screenshot(tmp_path / "native.png", page.clip())
    assert page.errors == []


def test_help_page_is_shown(page):
    page.open(workflows.graph("native"))
    page.show_help("InstantCharacterApply")
    assert "Adds a character to a FLUX.1 MODEL" in page.page.inner_text("body")
    page.page.wait_for_function(HELP_PICTURE, timeout=10_000)


def test_translations_are_served(server):
    for language, name in (("en", "InstantCharacter Apply"), ("zh", "InstantCharacter 应用")):
        assert server.get("/i18n")[language]["nodeDefs"]["InstantCharacterApply"]["display_name"] == name


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
