"""Who may import whom: each contract of ``pyproject.toml`` fails when a forbidden import is put in."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter needs Python 3.11")

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "instantcharacter", "toy")
CONTRACTS = re.findall(r'^name = "(.*)"\ntype = ', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def lint(tmp_path):
    """Returns the contracts that a copy of the code breaks once a file of it imports more."""

    def run(file: str, code: str) -> set[str]:
        for source in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
            copy = tmp_path / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
        with (tmp_path / file).open("a", encoding="utf-8") as copy:
            copy.write(code)
        command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-logo"]
        command += ["--no-cache", str(ROOT / "pyproject.toml")]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
        results = dict(re.findall(r"^(.+) (KEPT|BROKEN)$", printed, re.MULTILINE))
        assert [*results] == CONTRACTS, printed
        return {name for name, result in results.items() if result == "BROKEN"}

    return run


def test_every_contract_is_kept(lint):
    assert lint("instantcharacter/versions.py", "") == set()


FORBIDDEN = {
    "Layers": [
        ("instantcharacter/model/attention.py", "import instantcharacter.offload.streaming"),
        ("instantcharacter/offload/planning.py", "import instantcharacter.model.attention"),
        ("instantcharacter/files/catalog.py", "import instantcharacter.model.attention"),
        ("instantcharacter/character/image.py", "import instantcharacter.flux.layout"),
        ("instantcharacter/flux/layout.py", "import instantcharacter.training.config"),
        ("instantcharacter/flux/layout.py", "import instantcharacter.batch.values"),
        ("instantcharacter/batch/values.py", "import instantcharacter.training.config"),
        ("instantcharacter/training/config.py", "import instantcharacter.batch.values"),
        ("instantcharacter/training/config.py", "import instantcharacter.cli.main"),
        ("instantcharacter/cli/main.py", "import instantcharacter.comfyui.folders"),
        ("instantcharacter/comfyui/folders.py", "import instantcharacter.cli.main"),
    ],
    "comfyui/ does without training/": [
        ("instantcharacter/comfyui/folders.py", "import instantcharacter.training.config")
    ],
    "ComfyUI is imported in comfyui/ alone": [
        ("instantcharacter/flux/load.py", "import comfy.model_management"),
        ("instantcharacter/cli/main.py", "from folder_paths import models_dir"),
    ],
    "The package imports none of its users": [
        ("instantcharacter/training/config.py", "import toy.world"),
        ("toy/models.py", "import benchmarks.training"),
    ],
    "The package and the toy world import no tests": [
        ("instantcharacter/cli/demo.py", "from support import recorded"),
        ("toy/models.py", "from tests.support import recorded"),
    ],
    "No circles between files or folders": [
        ("instantcharacter/files/catalog.py", "import instantcharacter.files.folders")
    ],
    "Files import each other, never the public names": [
        ("instantcharacter/comfyui/folders.py", "from instantcharacter import Character")
    ],
}
"""By the contract that forbids them: files and imports."""


@pytest.mark.parametrize(
    ("contract", "file", "line"), [(contract, *case) for contract, cases in FORBIDDEN.items() for case in cases]
)
def test_forbidden_import_breaks_its_contract(lint, contract, file, line):
    assert any(name.startswith(contract) for name in lint(file, f"{line}\n"))


@pytest.mark.parametrize(
    "form", ["def load():\n    {}\n", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"]
)
@pytest.mark.parametrize("contract", ["Layers", "No circles between files or folders"])
def test_imports_in_functions_and_for_type_checkers_count(lint, contract, form):
    file, line = FORBIDDEN[contract][0]
    assert any(name.startswith(contract) for name in lint(file, form.format(line)))
