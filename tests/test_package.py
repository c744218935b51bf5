"""What the repository promises to those who install it, publish it, or look for its files."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
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
HOST = {
    "aiohttp",
    "app",
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfyui_version",
    "folder_paths",
    "latent_preview",
    "server",
    "utils",
}
"""ComfyUI's own modules, and its server's."""
NAMES = {"PIL": "pillow", "yaml": "pyyaml"}
"""Packages that are imported under another name."""
WITH_TORCH = {"triton"}
"""Packages that torch brings on some systems; the pack does without them elsewhere."""
NOT_IMPORTED = {"peft"}
"""Requirements that no file imports: diffusers reads LoRAs with peft."""


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(str(node.module).split(".")[0])
    return modules


def test_public_names_have_docstrings():
    for name in instantcharacter.__all__:
        assert getattr(instantcharacter, name).__doc__, name


def packages(sources):
    used = set().union(*(imported(path) for path in sources)) - set(sys.stdlib_module_names) - HOST
    return {NAMES.get(module, module) for module in used}


def stated(name: str) -> dict[str, str]:
    """The packages of a requirements file, and the text after each name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines if line[:1] not in ("", "#"))


def project() -> dict:
    """The content of ``pyproject.toml``."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def extra(name: str) -> set[str]:
    """The packages of an optional dependency."""
    lines = project()["project"]["optional-dependencies"][name]
    return {re.match(r"[\w-]+(\[\w+\])?", line)[0] for line in lines}


def test_requirements_are_what_is_imported():
    training = set((ROOT / "instantcharacter/training").rglob("*.py"))
    required = set(stated("requirements.txt"))
    assert packages(set(SOURCES) - training) - WITH_TORCH | NOT_IMPORTED == required
    assert extra("training") == {"datasets", "tensorboard"}
    assert packages(training) <= required | extra("training") | {"bitsandbytes"}


def test_extras_hold_what_tests_import():
    sources = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "toy").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    ours = {"benchmarks", "instantcharacter", "nodes", "reference", "support", "tests", "toy"}
    ours |= {path.stem for path in sources}  # benchmarks and toys that are run as scripts
    installed = {"websocket": "websocket-client", "importlinter": "import-linter"}
    used = {installed.get(name, name) for name in packages(sources) - ours}
    optional = {"torchvision", "bitsandbytes", "comfy_aimdo", *WITH_TORCH}  # tests that need these skip without them
    assert used - set(stated("requirements.txt")) - optional <= extra("training") | extra("test") | extra("dev")
    assert "comfyui-instantcharacter[training]" in extra("test")
    assert "comfyui-instantcharacter[test]" in extra("dev")


def test_no_requirement_has_an_upper_bound():
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
def test_picture_equals_the_output_of_its_script(name):
    from PIL import ImageChops

    namespace: dict = {"__name__": "draw_character", "__file__": "draw_character.py"}
    exec((ROOT / "assets/draw_character.py").read_text(encoding="utf-8"), namespace)
    committed = Image.open(ROOT / f"assets/{name}.png")
    difference = ImageChops.difference(committed, namespace[f"draw_{name}"]())
    assert committed.mode == "RGBA"
    assert max(high for _, high in difference.getextrema()) <= 8


def test_sheet_of_likeness_is_of_its_script_and_small():
    from assets import draw_likeness

    path = ROOT / "web/docs/images/not_alike.jpg"
    grey = Image.new("RGB", (8, 8), "grey")
    page = draw_likeness.sheet([[("title", grey)] * 4] * 5)
    assert path == draw_likeness.PATH
    assert page.size == Image.open(path).size
    assert page.getpixel((draw_likeness.GAP + 2, draw_likeness.LINE + 2)) == (128, 128, 128)
    assert path.stat().st_size <= 120_000


def test_readme_names_the_two_commands_and_the_licences():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for words in ("make demo", "make test", "2504.12395", "non-commercial", "Apache-2.0"):
        assert words in readme


def messages(source: str) -> set[str]:
    """The texts in Python code, with … for what an f-string or ``format`` fills in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub(r"\{\}|%s|%d", "…", node.value))
    return found


def test_readme_explains_messages_that_the_package_has():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = readme.split("What this pack says:")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", ours, re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    texts = set().union(*(messages(path.read_text(encoding="utf-8")) for path in SOURCES))
    assert len(quoted) > 10
    assert [message for message in quoted if not any(message in text for text in texts)] == []


@pytest.mark.parametrize("document", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_to_files_lead_somewhere(document):
    for link in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / document).read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), link


def test_readme_has_a_line_for_each_file_of_the_package():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## How it is built")[1].split("```")[1]
    listed, folders = set(), {0: ROOT}
    for indent, name in re.findall(r"^( *)([\w./]+)(?:  |$)", tree, re.MULTILINE):
        path = folders[len(indent)] / name
        folders[len(indent) + 4] = path
        listed |= {path} if path.suffix else set()
    package = ROOT / "instantcharacter"
    assert {path for path in listed if package in path.parents} >= set(package.rglob("*.py")) - set(
        package.rglob("*/__init__.py")
    )
    assert [path for path in listed if not path.exists()] == []


def test_registry_finds_what_it_needs():
    comfy = project()["tool"]["comfy"]
    assert comfy["DisplayName"] == "InstantCharacter"
    assert comfy["requires-comfyui"] == ">=0.17.0"
    assert comfy["PublisherId"]
    assert project()["project"]["urls"]["Repository"]
    icon = ROOT / comfy["Icon"].split("/main/")[1]
    assert Image.open(icon).size == (400, 400)


def test_installed_command_is_the_command_line():
    module, name = project()["project"]["scripts"]["instantcharacter"].split(":")
    assert getattr(import_module(module), name)([]) == 0


# Releases


@pytest.fixture
def version_problems():
    """The check of ``publish.yml``: returns the problems of a tag, for the files of a folder."""
    pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return runpy.run_path(str(ROOT / ".ci/check_version.py"))["problems"]


@pytest.fixture
def release(tmp_path):
    """Returns a folder with a version and a changelog."""

    def write(version: str, *sections: str) -> Path:
        (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n', encoding="utf-8")
        (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n" + "\n".join(sections), encoding="utf-8")
        return tmp_path

    return write


def test_version_is_the_newest_of_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d.*?)\]", changelog, re.MULTILINE)[0] == instantcharacter.__version__
    assert project()["project"]["version"] == instantcharacter.__version__


def test_release_with_equal_versions_has_no_problems(version_problems, release):
    folder = release("1.2.3", "## [Unreleased]\n", "## [1.2.3] - 2026-01-31\n\n- News.\n", "## [1.2.2] - 2026-01-01\n")
    assert version_problems("v1.2.3", folder) == []


@pytest.mark.parametrize(
    ("tag", "version", "sections", "problem"),
    [
        ("v1.2.4", "1.2.3", ["## [1.2.3] - 2026-01-31\n"], "the tag is v1.2.4, and pyproject.toml has version 1.2.3"),
        ("1.2.3", "1.2.3", ["## [1.2.3] - 2026-01-31\n"], "not of the form v1.2.3"),
        ("v1.2.3", "1.2.3", ["## [1.2.2] - 2026-01-31\n"], "CHANGELOG.md begins with"),
        ("v1.2.3", "1.2.3", [], "CHANGELOG.md begins with"),
        ("v1.2.3", "1.2.3", ["## [1.2.3]\n"], "no date for 1.2.3"),
        ("v1.2.3", "1.2.3", ["## [Unreleased]\n\n- News.\n", "## [1.2.3] - 2026-01-31\n"], "entries under Unreleased"),
    ],
)
def test_release_with_unequal_versions_is_refused(version_problems, release, tag, version, sections, problem):
    assert any(problem in text for text in version_problems(tag, release(version, *sections)))


# The registry's archive


def tracked(*options: str) -> set[str]:
    run = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git repository")
    return {name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The pack as the ComfyUI registry delivers it: tracked files without those in ``.comfyignore``."""
    folder = tmp_path_factory.mktemp("archive")
    for name in tracked() - tracked("--cached", "--ignored", "--exclude-from=.comfyignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def test_archive_has_every_file_of_the_package_and_of_comfyui(archive):
    names = {path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file()}
    for folder in ("instantcharacter", "web", "locales", "workflows", "subgraphs"):
        assert {name for name in tracked() if name.startswith(f"{folder}/")} <= names
    for name in ("__init__.py", "nodes.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        assert name in names


def test_archive_has_the_pictures_that_its_workflows_load(archive):
    for workflow in (archive / "workflows").glob("*.json"):
        for picture in re.findall(r'"([\w-]+\.png)"', workflow.read_text(encoding="utf-8")):
            assert (archive / "assets" / picture).is_file(), f"{workflow.name}: {picture}"


def test_archive_leaves_out_tests_and_tools(archive):
    names = {path.name for path in archive.iterdir()}
    assert not names & {"tests", "toy", "benchmarks", ".github", ".ci", "Makefile"}
    assert not (archive / "assets/demo.png").exists()


def test_toy_models_load_from_the_archive(archive):
    code = (
        "import instantcharacter as pack\nfrom instantcharacter.files import catalog\n"
        "pack.CharacterEncoder.from_pretrained(catalog.toy('siglip'), catalog.toy('dinov2'))\n"
        "pack.CharacterAdapter.from_file(catalog.toy('adapter'))\n"
        "print(catalog.toy('flux'), pack.__version__, pack.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=archive, capture_output=True, text=True, check=True)
    flux, version, file = run.stdout.split()
    assert Path(flux).is_relative_to(archive)
    assert Path(file).is_relative_to(archive)
    assert version == instantcharacter.__version__


def test_entry_point_can_be_imported_without_comfyui():
    code = "import runpy, sys; print(runpy.run_path('__init__.py')['WEB_DIRECTORY'], 'comfy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "web False"
