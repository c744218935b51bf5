from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import instantcharacter
from instantcharacter import versions


def test_version_is_that_of_pyproject():
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{instantcharacter.__version__}"' in pyproject


def test_installed_package_has_the_version_of_its_metadata(tmp_path, monkeypatch):
    """Beside an installed package there is no pyproject.toml, or another project's."""
    monkeypatch.setattr(metadata, "version", lambda name: {versions.NAME: "1.2.3"}[name])
    monkeypatch.setattr(versions, "PYPROJECT", tmp_path / "pyproject.toml")
    assert instantcharacter.__version__ == "1.2.3"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9.9"\n')
    assert instantcharacter.__version__ == "1.2.3"


def test_public_names_are_listed_before_they_are_imported():
    code = (
        "import sys, instantcharacter; assert set(instantcharacter.__all__) < set(dir(instantcharacter)); "
        "instantcharacter.__version__; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
