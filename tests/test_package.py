"""What the repository promises to those who install it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import instantcharacter

ROOT = Path(__file__).parent.parent
SOURCES = [*sorted((ROOT / "instantcharacter").rglob("*.py")), *sorted(ROOT.glob("*.py"))]
HOST = {"comfy", "comfy_api", "comfyui_version", "folder_paths", "latent_preview", "server"}
"""What comes with ComfyUI."""
RUN_TIME = {
    "torch", "diffusers", "transformers", "accelerate", "huggingface_hub",
    "safetensors", "einops", "pillow", "numpy", "peft", "tokenizers",
}  # fmt: skip


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
    used = set().union(*(imported(path) for path in sources)) - set(sys.stdlib_module_names)
    return {"pillow" if module == "PIL" else module for module in used}


def test_every_import_is_a_stated_requirement():
    stated = re.findall(r"^([a-z_]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    training = set(SOURCES) & set((ROOT / "instantcharacter/training").glob("*.py"))
    theirs = {"tokenizers", "tqdm", "psutil"}  # transformers', huggingface_hub's and accelerate's own: always there
    assert packages(set(SOURCES) - training) - HOST <= set(stated) | theirs
    assert set(stated) <= RUN_TIME
    extra = re.findall(
        r'"([a-z]+)>=', re.search(r"^training = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    )
    assert set(extra) == {"datasets", "tensorboard", "pyyaml"}
    named = {"pyyaml" if module == "yaml" else module for module in packages(training)}
    assert named <= set(stated) | theirs | set(extra) | {"bitsandbytes"}


def test_torch_is_left_as_the_user_has_it():
    (line,) = re.findall(r"^torch.*$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert not re.search(r"==|<|~=", line)


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
