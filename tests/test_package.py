"""What the repository promises to those who install it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from packaging.version import Version
from PIL import Image
from support import recorded

import instantcharacter
from instantcharacter import CharacterEncoder, versions

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "instantcharacter").rglob("*.py")), *sorted(ROOT.glob("*.py"))]
HOST = {"comfy", "comfy_api", "comfyui_version", "folder_paths", "latent_preview", "server"}
"""What comes with ComfyUI."""
NAMES = {"PIL": "pillow", "yaml": "pyyaml"}
"""Packages that are imported under another name."""
UNSEEN = {"peft"}
"""What is needed and not imported: diffusers reads LoRAs with it."""


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(str(node.module).split(".")[0])
    return modules


def test_public_names_are_there():
    for name in instantcharacter.__all__:
        assert getattr(instantcharacter, name).__doc__, name


def packages(sources):
    used = set().union(*(imported(path) for path in sources)) - set(sys.stdlib_module_names) - HOST
    return {NAMES.get(module, module) for module in used}


def stated(name: str) -> dict[str, str]:
    """What a file of requirements says of each package, after its name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines if line[:1] not in ("", "#"))


def test_requirements_are_what_is_imported():
    training = set((ROOT / "instantcharacter/training").rglob("*.py"))
    required = set(stated("requirements.txt"))
    assert packages(set(SOURCES) - training) | UNSEEN == required
    extra = re.search(r"^training = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    extra = set(re.findall(r'"([a-z]+)>=', extra))
    assert extra == {"datasets", "tensorboard"}
    assert packages(training) <= required | extra | {"bitsandbytes"}


def test_nothing_that_a_comfyui_has_is_held_back():
    for package, bounds in stated("requirements.txt").items():
        assert re.fullmatch(r"(>=[\d.]+)?", bounds), package
    assert stated("requirements.txt")["torch"] == ""


def test_tested_versions_are_those_that_the_tests_install():
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for package, tested in versions.TESTED.items():
        found = re.findall(rf"^{package}==([\d.]+)", pinned, re.MULTILINE)
        assert max(found, key=Version) == tested


def test_every_requirement_is_pinned_for_the_tests():
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for package in stated("requirements.txt"):
        assert re.search(rf"^{package}==", pinned, re.MULTILINE), package


@pytest.mark.parametrize("package", versions.TESTED)
@pytest.mark.parametrize("newer", [True, False])
def test_newer_versions_are_warned_of_once_when_they_are_used(pipeline, monkeypatch, caplog, package, newer):
    tested = versions.TESTED[package]
    versions.warn_if_newer.cache_clear()
    monkeypatch.setattr(import_module(package), "__version__", f"{tested}.1" if newer else tested)
    for _ in range(2):
        CharacterEncoder.from_pretrained(recorded.FOLDER / "siglip", recorded.FOLDER / "dinov2")
        pipeline.set_character_adapter(recorded.adapter())
    versions.warn_if_newer.cache_clear()
    warned = [record.getMessage() for record in caplog.records if "newer than" in record.getMessage()]
    warned = [message for message in warned if message.startswith(package)]
    assert len(warned) == newer
    assert all(f"pip install {package}=={tested}" in message for message in warned)


def test_importing_loads_nothing_heavy():
    code = "import sys, instantcharacter; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["character", "owl", "icon"])
def test_reference_picture_is_what_its_script_draws(name):
    from PIL import ImageChops

    namespace: dict = {"__name__": "draw_character", "__file__": "draw_character.py"}
    exec((ROOT / "assets/draw_character.py").read_text(encoding="utf-8"), namespace)
    kept = Image.open(ROOT / f"assets/{name}.png")
    difference = ImageChops.difference(kept, namespace[f"draw_{name}"]())
    assert kept.mode == "RGBA"
    assert max(high for _, high in difference.getextrema()) <= 8


def test_readme_names_the_two_commands_and_the_licences():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for words in ("make demo", "make test", "2504.12395", "non-commercial", "Apache-2.0"):
        assert words in readme
    for link in re.findall(r"\]\((?!http)([^)#]+)", readme):
        assert (ROOT / link).exists(), link


def test_registry_finds_what_it_needs():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy = project["tool"]["comfy"]
    assert comfy["DisplayName"] == "InstantCharacter"
    assert comfy["requires-comfyui"] == ">=0.17.0"
    assert comfy["PublisherId"]
    assert project["project"]["urls"]["Repository"]
    icon = ROOT / comfy["Icon"].split("/main/")[1]
    assert Image.open(icon).size == (400, 400)


def test_entry_point_can_be_imported_without_comfyui():
    code = "import runpy, sys; print(runpy.run_path('__init__.py')['WEB_DIRECTORY'], 'comfy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "web False"
