"""The pack in a real ComfyUI, on its CPU, with tiny weights: through its queue, as a browser or script uses it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from support import server as comfyui
from support import tiny_models, workflows
from support.server import Failed, Server

TINY = {"width": 256, "height": 256, "steps": 3, "num_inference_steps": 3}
"""Settings that every workflow is run with."""
PREPARE = "InstantCharacterPrepareReference"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(comfyui.why_not()), reason=str(comfyui.why_not())),
    pytest.mark.xdist_group("comfyui"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Server:
    folder = tmp_path_factory.mktemp("comfyui")
    tiny_models.fill(folder)
    if comfyui.gguf_pack():
        tiny_models.save_gguf(folder / "models/unet/flux1-dev-Q8_0.gguf")
    with comfyui.serving(folder, "--preview-method", "auto") as server:
        yield server


def workflow(name: str, **changes: object) -> dict:
    """An API workflow at a tiny size; ``Node__input=value`` changes an input of every node of that class."""
    prompt = workflows.prompt(name)
    settings = {key.split("__")[0]: {} for key in changes}
    side = next((node["inputs"]["width"] for node in prompt.values() if "LatentImage" in node["class_type"]), None)
    for key, value in changes.items():
        node, setting = key.split("__")
        settings[node][setting] = value
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= {key: value for key, value in TINY.items() if key in inputs}
        if node["_meta"]["title"] == "One half of it":
            inputs["width"] = TINY["width"] // 2
        if node["class_type"] == "MaskComposite":
            inputs["x"] = inputs["x"] * TINY["width"] // 1024
        if node["class_type"] == "PrimitiveInt":
            inputs["value"] = inputs["value"] * TINY["width"] // side
        inputs |= settings.get(node["class_type"], {})
    return comfyui.with_tiny_text_encoder(prompt)


def only(prompt: dict, name: str) -> dict:
    """The one node of a class."""
    (node,) = (node for node in prompt.values() if node["class_type"] == name)
    return node


def shown(outputs: dict) -> list[dict]:
    return [picture for node in outputs.values() for picture in node.get("images", []) if picture["type"] == "output"]


def generated(server: Server, prompt: dict, seconds: float = 240) -> Image.Image:
    """The picture that a prompt saves, fetched."""
    (picture,) = shown(server.run(prompt, seconds))
    return Image.open(io.BytesIO(server.picture(picture))).convert("RGB")


def error(history: dict) -> dict:
    """The error that a prompt ended in, as ``/history`` has it."""
    return next(content for kind, content in history["status"]["messages"] if kind == "execution_error")


@contextmanager
def moved_away(server: Server, *names: str) -> Iterator[None]:
    """The server's model folders of these names, gone in the block."""
    folders = {server.folder / "models" / name: server.folder / f"away-{name}" for name in names}
    for folder, away in folders.items():
        folder.rename(away)
    try:
        yield
    finally:
        for folder, away in folders.items():
            shutil.rmtree(folder, ignore_errors=True)  # made for a file that was to be fetched
            away.rename(folder)


# Every workflow


@pytest.mark.parametrize(
    "name",
    [
        *("self_contained", "native", "turbo_8_steps", "two_characters", "earlier_pack", "earlier_pack_local"),
        *("toy_any_machine", "toy_native_any_machine"),
    ],
)
def test_workflow_runs(server, name):
    picture = generated(server, workflow(name))
    assert picture.size == (256, 256)
    assert len(picture.getcolors(2**16)) > 100


@pytest.mark.parametrize("name", ["native_refine", "toy_refine_any_machine"])
def test_refine_changes_the_square_alone(server, name):
    """Beside the enlarged picture that it starts from."""
    prompt = workflow(name)
    enlarged = next(key for key, node in prompt.items() if node["class_type"] == "ImageScaleBy")
    prompt["90"] = {"class_type": "SaveImage", "inputs": {"images": [enlarged, 0], "filename_prefix": "enlarged"}}
    refined, before = sorted(shown(server.run(prompt)), key=lambda picture: picture["filename"].startswith("enlarged"))
    pictures = [Image.open(io.BytesIO(server.picture(picture))).convert("RGB") for picture in (refined, before)]
    assert pictures[0].size == pictures[1].size == (512, 512)
    left, top = (node["inputs"]["value"] for node in prompt.values() if node["class_type"] == "PrimitiveInt")
    changed = ImageChops.difference(*pictures).getbbox()
    assert changed is not None
    assert left <= changed[0] < changed[2] <= left + 256
    assert top <= changed[1] < changed[3] <= top + 256


def test_the_toy_lora_changes_the_picture(server):
    styled = workflow("toy_any_machine", InstantCharacterFluxLoader__lora="toy")
    assert generated(server, styled).tobytes() != generated(server, workflow("toy_any_machine")).tobytes()


def test_the_turbo_lora_changes_the_picture(server):
    plain = generated(server, workflow("turbo_8_steps", LoraLoaderModelOnly__strength_model=0.0))
    assert generated(server, workflow("turbo_8_steps")).tobytes() != plain.tobytes()


def test_the_samplers_cache_changes_the_picture(server):
    """The toy's, since with random weights no step is predictable."""
    cached = workflow(
        "toy_any_machine", InstantCharacterSampler__cache="first_block", InstantCharacterSampler__steps=16
    )
    plain = workflow("toy_any_machine", InstantCharacterSampler__steps=16)
    assert generated(server, cached).tobytes() != generated(server, plain).tobytes()


def alive(server: Server, name: str) -> int:
    """How many objects of a class ComfyUI's process has."""
    return server.run({"1": {"class_type": "TestAlive", "inputs": {"name": name}}})["1"]["alive"][0]


def test_another_lora_strength_loads_nothing_and_memory_is_freed(server):
    def styled(strength: float) -> dict:
        return workflow(
            "toy_any_machine",
            InstantCharacterFluxLoader__lora="toy",
            InstantCharacterFluxLoader__lora_strength=strength,
        )

    def loaded() -> int:
        return server.log.read_text().count("InstantCharacter's memory plan is")

    weak, times = generated(server, styled(0.2)), loaded()
    strong = generated(server, styled(1.2))
    assert strong.tobytes() != weak.tobytes()
    assert generated(server, styled(0.2)).tobytes() == weak.tobytes()
    both = styled(0.2) | {f"2{key}": node for key, node in styled(1.2).items() if "FluxLoader" in node["class_type"]}
    (loader,) = (key for key in both if key.startswith("2") and "FluxLoader" in both[key]["class_type"])
    sampler, saver = (f"2{key}" for key in ("8", "9"))
    both[sampler] = json.loads(json.dumps(only(styled(1.2), "InstantCharacterSampler")))
    both[sampler]["inputs"]["flux_pipe"] = [loader, 0]
    both[saver] = {"class_type": "SaveImage", "inputs": {"images": [sampler, 0], "filename_prefix": "strong"}}
    pictures = {shown_["filename"][:6]: server.picture(shown_) for shown_ in shown(server.run(both))}
    assert Image.open(io.BytesIO(pictures.pop("strong"))).convert("RGB").tobytes() == strong.tobytes()
    (other,) = pictures.values()
    assert Image.open(io.BytesIO(other)).convert("RGB").tobytes() == weak.tobytes()
    assert loaded() == times
    server.post("/free", {"unload_models": True, "free_memory": True})
    alive(server, "HostedPipeline")  # ComfyUI frees after the next prompt, if that comes before it wakes up
    assert alive(server, "HostedPipeline") == 0


@pytest.mark.skipif(comfyui.gguf_pack() is None, reason="no ComfyUI-GGUF in that ComfyUI")
def test_gguf_and_lora_workflow_runs_with_the_character(server):
    whole = generated(server, workflow("gguf_and_style_lora"))
    without = generated(server, workflow("gguf_and_style_lora", InstantCharacterApply__scale=0.0))
    assert whole.size == (256, 256)
    assert whole.tobytes() != without.tobytes()


def test_background_removal_workflow_runs(server):
    """BiRefNet at its real size, since ComfyUI knows no smaller one: a minute or two on a CPU."""
    found = comfyui.find_comfyui()
    if not (found / "comfy/background_removal/birefnet.json").is_file():
        pytest.skip("that ComfyUI has no background removal nodes")
    maker = comfyui.PACK / "tests/comfyui/inside/make_birefnet.py"
    file = server.folder / "models/background_removal/birefnet.safetensors"
    subprocess.run([comfyui.comfyui_python(found), maker, found, file], check=True, capture_output=True)
    try:
        assert generated(server, workflow("background_removal"), seconds=900).size == (256, 256)
        prompt = up_to_prepare("character.png")
        prompt["6"]["inputs"]["fit"] = "auto"
        del prompt["6"]["inputs"]["mask"]
        assert "birefnet.safetensors" in server.run(prompt, 900)["6"]["text"][0]
    finally:
        file.unlink()  # Prepare would use it for every other picture without a mask


def test_saved_character_generates_the_same_picture(server):
    outputs = server.run(workflow("save_character", InstantCharacterSaveCharacter__name="friends/fox"))
    thumbnail = Image.open(io.BytesIO(server.picture(outputs["8"]["images"][0])))
    assert thumbnail.size == (256, 256)
    assert (server.folder / "models/characters/friends/fox.safetensors").is_file()
    again = workflow("load_character", InstantCharacterLoadCharacter__name="friends/fox.safetensors")
    assert generated(server, again).tobytes() == generated(server, workflow("native")).tobytes()


def test_saving_another_character_under_a_name_needs_overwrite(server):
    save = {"InstantCharacterSaveCharacter__name": "kept"}
    server.run(workflow("save_character", **save))
    server.run(workflow("save_character", **save, InstantCharacterPrepareReference__fit="stretch"))  # the same
    other = {**save, "LoadImage__image": "owl.png"}
    with pytest.raises(Failed, match="another character.*switch overwrite on"):
        server.run(workflow("save_character", **other))
    server.run(workflow("save_character", **other, InstantCharacterSaveCharacter__overwrite=True))


# The library of characters


def answer(server: Server, method: str, path: str = "", **query: str) -> tuple[int, dict | list | bytes]:
    """The status of a request to the pack's routes, and what it answers."""
    fields = urllib.parse.urlencode(query)
    url = f"{server.url}/api/instantcharacter/characters{path}?{fields}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60) as response:
            status, kind, content = response.status, response.headers["Content-Type"], response.read()
    except urllib.error.HTTPError as error:
        status, kind, content = error.code, error.headers["Content-Type"], error.read()
    return status, json.loads(content) if "json" in kind else content


def test_saved_characters_are_listed_shown_and_deleted(server):
    server.run(workflow("save_character", InstantCharacterSaveCharacter__name="shelf/fox"))
    name = "shelf/fox.safetensors"
    status, listed = answer(server, "GET")
    (fox,) = (character for character in listed if character["name"] == name)
    assert (status, fox["has_thumbnail"]) == (200, True)
    status, png = answer(server, "GET", "/thumbnail", name=name)
    assert (status, Image.open(io.BytesIO(png)).size) == (200, (256, 256))
    native = server.get(f"/api/experiment/models/preview/characters/0/{name}")
    assert Image.open(io.BytesIO(native)).size == (256, 256)
    assert answer(server, "DELETE", name=name) == (200, {"deleted": name})
    assert not (server.folder / "models/characters" / name).exists()
    assert name not in [character["name"] for character in answer(server, "GET")[1]]
    listed = server.get("/object_info/InstantCharacterLoadCharacter")["InstantCharacterLoadCharacter"]
    assert name not in json.dumps(listed)


def test_requests_for_other_files_are_refused_with_a_sentence(server):
    characters = server.folder / "models/characters"
    characters.mkdir(exist_ok=True)
    (characters / "notes.safetensors").write_text("my notes")
    outside = "../ipadapter/instantcharacter_ip-adapter.bin"
    for name in ("", outside, outside.replace("/", "\\"), str(characters / "notes.safetensors"), "a\0b"):
        for method, path in (("GET", "/thumbnail"), ("DELETE", "")):
            status, content = answer(server, method, path, name=name)
            assert status == 404
            assert "in none of ComfyUI's folders characters" in content["error"]
    for method, path in (("GET", "/thumbnail"), ("DELETE", "")):
        status, content = answer(server, method, path, name="notes.safetensors")
        assert status == 400
        assert "character file" in content["error"]
    assert answer(server, "POST", name="notes.safetensors")[0] == 405
    assert (characters / "notes.safetensors").read_text() == "my notes"
    assert (server.folder / "models/ipadapter/instantcharacter_ip-adapter.bin").is_file()


def test_every_character_of_a_folder_is_generated(server):
    for name, picture in (("fox", "character.png"), ("owl", "owl.png")):
        server.run(
            workflow("save_character", InstantCharacterSaveCharacter__name=f"pair/{name}", LoadImage__image=picture)
        )
    prompt = workflow("load_character")
    node = only(prompt, "InstantCharacterLoadCharacter")
    node["class_type"] = "InstantCharacterLoadCharacters"
    node["inputs"] = {"folder": "pair", "adapter": node["inputs"]["adapter"]}
    pictures = [server.picture(picture) for picture in shown(server.run(prompt))]
    assert len(pictures) == 2
    alone = [
        workflow("load_character", InstantCharacterLoadCharacter__name=f"pair/{name}.safetensors")
        for name in ("fox", "owl")
    ]
    fox, owl = (Image.open(io.BytesIO(picture)).convert("RGB").tobytes() for picture in pictures)
    assert [fox, owl] == [generated(server, prompt).tobytes() for prompt in alone]
    assert fox != owl


# Pictures that people have


def save_input(server: Server, name: str, picture: Image.Image) -> str:
    picture.save(server.folder / "input" / name)
    return name


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A photograph's likes, 320×200: a red character left of the middle of a background of many colours."""
    background = Image.linear_gradient("L").resize((320, 200))
    picture = Image.merge("RGB", (background, background.transpose(Image.Transpose.ROTATE_180), background.rotate(90)))
    picture.paste((200, 30, 30), (60, 60, 130, 180))
    picture.paste((120, 10, 60), (80, 60, 110, 90))
    return picture


def prepared(server: Server, name: str) -> tuple[Image.Image, str]:
    """What Prepare in a shipped workflow makes of a file, and what it says of it."""
    on_node = server.run(up_to_prepare(name))["6"]
    picture = Image.open(io.BytesIO(server.picture(on_node["images"][0]))).convert("RGB")
    return picture, on_node["text"][0]


def up_to_prepare(name: str) -> dict:
    """The nodes of a shipped workflow that prepare this file."""
    prompt = workflow("native", LoadImage__image=name)
    wanted = {key: prompt[key] for key in ("4", "6")}
    wanted["6"]["inputs"]["fit"] = "pad"  # without the background removal model, if it is there
    return {**wanted, "40": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}}}


@pytest.mark.parametrize("kind", ["jpg", "RGB.png", "L.png", "LA.png", "P.png", "bmp", "webp"])
def test_pictures_without_a_mask_are_kept_whole(server, photo, kind):
    """Load Image gives a picture without alpha a mask of 64×64 zeros."""
    mode = kind.split(".")[0] if "." in kind else "RGB"
    picture, sentence = prepared(server, save_input(server, f"whole.{kind}", photo.convert(mode)))
    assert picture.size == (320, 320)
    assert picture.getpixel((160, 10)) == (255, 255, 255)
    assert sentence == "kept the whole picture: nothing of it is masked"


@pytest.mark.parametrize("beneath", ["the picture", "black"])
def test_transparent_picture_is_cut_out(server, photo, beneath):
    """Load Image's mask is white where it is transparent."""
    alpha = Image.new("L", photo.size, 0)
    alpha.paste(255, (60, 60, 130, 180))
    picture = photo.copy() if beneath == "the picture" else Image.composite(photo, Image.new("RGB", photo.size), alpha)
    picture.putalpha(alpha)
    square, sentence = prepared(server, save_input(server, f"cut {beneath}.png", picture))
    assert sentence == "kept what is black in the mask, 13% of the picture"
    assert square.size == (132, 132)


def test_character_that_is_painted_over_in_the_mask_editor_is_kept(server, photo):
    """The mask editor makes what is painted transparent, and keeps the picture under it."""
    alpha = Image.new("L", photo.size, 255)
    alpha.paste(0, (50, 50, 140, 190))
    picture = photo.copy()
    picture.putalpha(alpha)
    square, sentence = prepared(server, save_input(server, "clipspace-painted.png", picture))
    assert sentence == "kept what is white in the mask, 20% of the picture"
    assert square.getpixel((square.width // 2, square.height // 2)) == (200, 30, 30)


def test_mask_of_another_size_is_stretched_over_the_picture(server, photo):
    prompt = up_to_prepare(save_input(server, "photo.png", photo))
    prompt["41"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 100, "height": 50}}
    prompt["42"] = {"class_type": "FeatherMask", "inputs": dict.fromkeys(("left", "right", "top", "bottom"), 20)}
    prompt["42"]["inputs"]["mask"] = ["41", 0]
    prompt["6"]["inputs"]["mask"] = ["42", 0]
    assert server.run(prompt)["6"]["text"][0].startswith("kept what is white in the mask")


@pytest.mark.parametrize("name", [workflows.name(path) for path in workflows.PROMPTS])
def test_workflow_runs_with_pictures_that_people_have(server, photo, name):
    if name == "background_removal":
        pytest.skip("its model has one size, which takes a minute on a CPU: benchmarks.rehearsal runs it")
    if "gguf" in name and comfyui.gguf_pack() is None:
        pytest.skip("no ComfyUI-GGUF in that ComfyUI")
    alpha = Image.new("L", photo.size, 0)
    alpha.paste(255, (60, 60, 130, 180))
    cut_out = photo.copy()
    cut_out.putalpha(alpha)
    pictures = {"photo.jpg": photo, "cut_out.png": cut_out, "portrait.jpg": photo.transpose(Image.Transpose.ROTATE_90)}
    for file, picture in pictures.items():
        save_input(server, file, picture)
        if name == "load_character":
            server.run(saving("fox", file))
        prompt = workflow(name)
        for node in prompt.values():
            if node["class_type"] in ("LoadImage", "InstantCharacterExample"):
                node |= {"class_type": "LoadImage", "inputs": {"image": file}}
        if name == "save_character":
            server.run(saving("fox", file))
        else:
            assert len(generated(server, prompt).getcolors(2**20)) > 100


def saving(name: str, file: str) -> dict:
    """The shipped workflow that saves a character, of this picture."""
    changes = {"InstantCharacterSaveCharacter__name": name, "InstantCharacterSaveCharacter__overwrite": True}
    return workflow("save_character", LoadImage__image=file, **changes)


@pytest.mark.parametrize(
    "literal", [{"PATH": 1}, {"__value__": ["PATH"]}, ["PATH"], "PATH", [["PATH"]], 7, {"image": "PATH"}]
)
@pytest.mark.parametrize(
    ("name", "node", "setting"),
    [
        ("native", PREPARE, "image"),
        ("native", PREPARE, "mask"),
        ("native", "InstantCharacterEncode", "image"),
        ("native", "InstantCharacterApply", "mask"),
        ("self_contained", "InstantCharacterSampler", "image"),
        ("self_contained", "InstantCharacterSampler", "latent"),
        ("earlier_pack", "InstantCharacterGenerate", "subject_image"),
    ],
)
def test_a_path_in_place_of_a_link_is_not_read(server, name, node, setting, literal):
    secret = server.folder / "secret.png"
    Image.new("RGB", (64, 64), (12, 34, 56)).save(secret)
    literal = json.loads(json.dumps(literal).replace("PATH", str(secret)))
    prompt = workflow(name, **{f"{node}__{setting}": literal})
    try:
        history = server.wait(server.queue(prompt))
    except Failed as refused:  # ComfyUI's own validation
        assert "secret" not in str(refused) or "bad_linked_input" in str(refused) or "invalid" in str(refused).lower()
        return
    failure = error(history)
    assert failure["node_type"] == node
    assert f"{setting} is a" in failure["exception_message"]


# Generating


def test_scale_zero_is_plain_flux_bit_for_bit(server):
    plain = workflow("native", InstantCharacterApply__scale=0.0)
    sampler, apply = (only(plain, name) for name in ("KSampler", "InstantCharacterApply"))
    zero = generated(server, plain)
    sampler["inputs"]["model"] = apply["inputs"]["model"]
    assert generated(server, plain).tobytes() == zero.tobytes()
    assert generated(server, workflow("native")).tobytes() != zero.tobytes()


def test_self_contained_sampler_without_a_character_is_plain_flux(server):
    without = workflow("self_contained")
    del without["8"]["inputs"]["character"]
    zero = generated(server, workflow("self_contained", InstantCharacterSampler__scale=0.0))
    assert generated(server, without).tobytes() == zero.tobytes()
    assert generated(server, workflow("self_contained")).tobytes() != zero.tobytes()


def test_sampler_takes_conditioning_instead_of_text(server):
    prompt = workflow(
        "self_contained", InstantCharacterFluxLoader__clip_l="none", InstantCharacterFluxLoader__t5="none"
    )
    prompt["20"] = {"class_type": "TestTextEncode", "inputs": {"text": "a fox"}}
    prompt["8"]["inputs"]["positive"] = ["20", 0]
    one = generated(server, prompt)
    prompt["20"]["inputs"]["text"] = "an owl"
    assert generated(server, prompt).tobytes() != one.tobytes()


def test_text_without_text_encoders_is_an_error(server):
    with pytest.raises(Failed, match="has no text encoders: load them, or connect a CONDITIONING"):
        server.run(workflow("self_contained", InstantCharacterFluxLoader__t5="none"))


@pytest.mark.parametrize("init", ["image", "latent"])
def test_sampler_starts_from_an_image_or_latent(server, init):
    prompt = workflow("self_contained", InstantCharacterSampler__denoise=0.4)
    prompt["20"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 272, "height": 256, "batch_size": 1, "color": 0xFF0000},
    }
    prompt["8"]["inputs"]["image"] = ["20", 0]
    if init == "latent":
        del prompt["8"]["inputs"]["image"]
        prompt["21"] = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 272, "height": 256, "batch_size": 1}}
        prompt["8"]["inputs"]["latent"] = ["21", 0]
    some = generated(server, prompt)
    assert some.size == (272, 256)
    prompt["8"]["inputs"]["denoise"] = 1.0
    assert generated(server, prompt).tobytes() != some.tobytes()


def test_samplers_latent_is_the_picture(server):
    prompt = workflow("self_contained", InstantCharacterSampler__batch_size=2)
    prompt["20"] = {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}}
    prompt["21"] = {"class_type": "VAEDecode", "inputs": {"samples": ["8", 1], "vae": ["20", 0]}}
    prompt["22"] = {"class_type": "SaveImage", "inputs": {"images": ["21", 0], "filename_prefix": "again"}}
    outputs = server.run(prompt)
    ours, theirs = (
        [Image.open(io.BytesIO(server.picture(picture))).convert("RGB") for picture in outputs[node]["images"]]
        for node in ("9", "22")
    )
    assert len(ours) == len(theirs) == 2
    assert ours[0].tobytes() != ours[1].tobytes()
    for one, other in zip(ours, theirs):
        assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 2


def test_progress_and_previews_are_sent(server):
    prompt = workflow("self_contained", InstantCharacterSampler__seed=77, InstantCharacterSampler__steps=4)
    with server.listening() as listener:
        prompt_id = server.queue(prompt)
        reported, previews = [], 0
        while True:
            message = listener.recv()
            if isinstance(message, bytes):
                previews += 1
                continue
            message = json.loads(message)
            if message["type"] == "progress" and message["data"]["node"] == "8":
                reported.append((message["data"]["value"], message["data"]["max"]))
            if message["type"] == "execution_success" and message["data"]["prompt_id"] == prompt_id:
                break
    assert reported[-1] == (4, 4)
    assert {value for value, _ in reported} >= {1, 2, 3, 4}
    assert previews >= 3


# Cancel


@pytest.mark.parametrize(("name", "node"), [("self_contained", "InstantCharacterSampler"), ("native", "KSampler")])
def test_cancel_stops_within_a_step_and_the_next_prompt_runs(server, name, node):
    before = generated(server, workflow(name))
    long = workflow(name, **{f"{node}__steps": 200, f"{node}__seed": 5})
    key = next(key for key, content in long.items() if content["class_type"] == node)
    after_cancel = 0
    with server.listening() as listener:
        prompt_id = server.queue(long)
        cancelled = False
        while True:
            message = listener.recv()
            if isinstance(message, bytes):
                continue
            message = json.loads(message)
            if message["type"] == "progress" and message["data"]["node"] == key:
                after_cancel += cancelled
                if message["data"]["value"] >= 3 and not cancelled:
                    server.post("/interrupt")
                    cancelled = True
            if message["type"] in ("execution_interrupted", "execution_success", "execution_error"):
                break
    assert message["type"] == "execution_interrupted"
    assert server.wait(prompt_id)["status"]["completed"] is False
    assert after_cancel <= 30  # a step of the tiny model takes less time than the message
    assert generated(server, workflow(name, SaveImage__filename_prefix=f"after {name}")).tobytes() == before.tobytes()


# Errors


def break_file(server: Server, path: str, content: bytes) -> str:
    target = server.folder / "models" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return Path(path).name if len(Path(path).parts) == 2 else str(Path(*Path(path).parts[1:]))


@pytest.mark.parametrize(
    ("name", "node", "setting", "source", "message"),
    [
        (
            "native",
            "InstantCharacterAdapterLoader",
            "adapter",
            "ipadapter/instantcharacter_ip-adapter.bin",
            "cut off",
        ),
        (
            "native",
            "InstantCharacterAdapterLoader",
            "adapter",
            "vae/ae.safetensors",
            "Expected an InstantCharacter adapter",
        ),
        ("native", "InstantCharacterEncoderLoader", "dinov2", "loras/ghibli_style.safetensors", "not DINOv2"),
        ("self_contained", "InstantCharacterFluxLoader", "flux", "vae/ae.safetensors", "Expected FLUX.1"),
        ("self_contained", "InstantCharacterFluxLoader", "vae", "unet/flux1-dev.safetensors", "Expected FLUX's VAE"),
    ],
)
def test_wrong_file_gives_the_nodes_error(server, name, node, setting, source, message):
    content = (server.folder / "models" / source).read_bytes()
    content = content[:-1] if message == "cut off" else content
    folder = {"adapter": "ipadapter", "dinov2": "clipvision", "flux": "unet", "vae": "vae"}[setting]
    wrong = break_file(server, f"{folder}/wrong-{setting}{Path(source).suffix}", content)
    history = server.wait(server.queue(workflow(name, **{f"{node}__{setting}": wrong})))
    failure = error(history)
    assert failure["node_type"] == node
    assert message in failure["exception_message"]
    assert wrong in failure["exception_message"]


def test_removed_file_is_refused_with_the_list(server):
    with pytest.raises(Failed, match="value_not_in_list"):
        server.queue(workflow("native", InstantCharacterAdapterLoader__adapter="gone.bin"))


def test_download_offline_says_what_to_do(server):
    prompt = workflow("self_contained", InstantCharacterFluxLoader__lora_strength=0.123)  # not a cached result
    with moved_away(server, "unet", "diffusers"):
        history = server.wait(server.queue(prompt))
    assert "go online, unset HF_HUB_OFFLINE" in error(history)["exception_message"]


def test_model_that_is_not_flux_gives_applys_error(server):
    prompt = workflow("native")
    apply = only(prompt, "InstantCharacterApply")
    prompt["40"] = {"class_type": "TestOtherModel", "inputs": {}}
    apply["inputs"]["model"] = ["40", 0]
    failure = error(server.wait(server.queue(prompt)))
    assert failure["node_type"] == "InstantCharacterApply"
    assert "InstantCharacter needs FLUX.1" in failure["exception_message"]


@pytest.mark.parametrize("path", ["/etc", "../../etc", "..", "C:\\Windows", ""])
def test_path_outside_the_model_folders_is_refused(server, path):
    prompt = workflow("earlier_pack_local", InstantCharacterLoadModelFromLocal__ip_adapter_path=path)
    message = error(server.wait(server.queue(prompt)))["exception_message"]
    assert "model folders" in message


# What the earlier pack left


TYPED = {
    "base_model_path": ("models/FLUX.1-dev", "diffusers/FLUX.1-dev"),
    "image_encoder_path": ("models/google/siglip-so400m-patch14-384", "clip_vision/siglip-so400m-patch14-384"),
    "image_encoder_2_path": ("models/facebook/dinov2-giant", "clip_vision/dinov2-giant"),
    "ip_adapter_path": ("models/InstantCharacter/instantcharacter_ip-adapter.bin", "ipadapter"),
}
"""What stands in its workflow file, and what the tests' models folder has of it."""


def test_earlier_packs_workflow_runs_with_its_own_paths(server):
    for path, there in TYPED.values():
        path = server.folder / (path if there != "ipadapter" else Path(path).parent)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(server.folder / "models" / there)
    paths = {f"InstantCharacterLoadModelFromLocal__{name}": path for name, (path, _) in TYPED.items()}
    before = generated(server, workflow("earlier_pack_local"))
    assert generated(server, workflow("earlier_pack_local", **paths)).tobytes() == before.tobytes()
    with_windows = {name: path.replace("/", "\\") for name, path in paths.items()}
    assert generated(server, workflow("earlier_pack_local", **with_windows)).tobytes() == before.tobytes()


def test_flux_folder_of_the_earlier_pack_is_used_with_its_text_encoders(server):
    """What its Load Model node fetched has no single files; the server is offline."""
    models = server.folder / "models"
    snapshot = models / "diffusers/models--black-forest-labs--FLUX.1-dev/snapshots/0ef5fff"
    snapshot.parent.mkdir(parents=True)
    (models / "diffusers/FLUX.1-dev").rename(snapshot)
    try:
        with moved_away(server, "unet", "text_encoders", "vae"):
            picture = generated(server, workflow("earlier_pack", InstantCharacterLoadModel__cpu_offload=False))
    finally:
        snapshot.rename(models / "diffusers/FLUX.1-dev")
    assert picture.tobytes() == generated(server, workflow("earlier_pack_local")).tobytes()


def test_cpu_offload_of_the_earlier_pack_takes_the_plan_that_fits(server):
    generated(server, workflow("earlier_pack", InstantCharacterLoadModel__cpu_offload=True))
    plans = set(re.findall(r"memory plan is (\w+)", server.log.read_text()))
    assert plans == {"none"}  # all of a tiny model fits


IMPOSSIBLE = ["\ud800", "\udcff", "a\0b", "x" * 300, "a/" * 3000]
"""Typed where a file's name belongs. JSON has lone surrogates, logs do not: they ended ComfyUI's only worker."""


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=lambda name: f"{ascii(name)[:8]}…")
@pytest.mark.parametrize(
    ("prompt", "setting"),
    [
        ("earlier_pack_local", "InstantCharacterLoadModelFromLocal__base_model_path"),
        ("save_character", "InstantCharacterSaveCharacter__name"),
    ],
)
def test_impossible_file_name_is_refused_and_the_next_prompt_runs(server, prompt, setting, name):
    failure = error(server.wait(server.queue(workflow(prompt, **{setting: name})), seconds=120))
    assert failure["exception_type"] == "ValueError"
    is_text = max(name) < "\ud800" or max(name) > "\udfff"
    expected = "cannot be a file: expected UTF-8" if is_text else "has letters that are not UTF-8"
    assert expected in failure["exception_message"]
    assert len(failure["exception_message"]) < 200


def test_typed_token_gives_a_warning_and_is_not_logged(server):
    prompt = workflow("earlier_pack", InstantCharacterLoadModel__hf_token="hf_do_not_keep_me")
    outputs = server.run(prompt)
    assert "Workflow files and pictures keep what is typed" in outputs["1"]["text"][0]
    log = server.log.read_text()
    assert "a Hugging Face token is typed into a node" in log
    assert "hf_do_not_keep_me" not in log
    small = [path for path in (server.folder / "models").rglob("*") if path.is_file() and path.stat().st_size < 1e6]
    assert not [path for path in small if b"hf_do_not_keep_me" in path.read_bytes()]


# Long runs


def test_many_prompts_with_changing_references_leave_memory_where_it_was(server):
    def run(i: int) -> None:
        server.run(
            workflow(
                "native" if i % 2 else "self_contained",
                InstantCharacterPrepareReference__margin=i / 100,
                KSampler__seed=i,
                InstantCharacterSampler__seed=i,
            )
        )

    memory = []
    for i in range(30):
        run(i)
        memory.append(server.memory())
    early, late = max(memory[6:10]), min(memory[-4:])
    assert late <= 1.05 * early, [f"{size / 2**20:.0f}" for size in memory]
    assert "memory leak" not in server.log.read_text().lower()
