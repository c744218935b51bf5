from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny

from instantcharacter import CharacterAdapter, CharacterEncoder, InstantCharacterPipeline
from instantcharacter.cli.main import main


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with tiny models in the hub's layout."""
    folder = tmp_path_factory.mktemp("models")
    InstantCharacterPipeline(**tiny.tiny_components()).save_pretrained(folder / "flux")
    tiny.tiny_adapter().save(folder / "adapter.safetensors")
    encoder = tiny.tiny_encoder()
    encoder.siglip.save_pretrained(folder / "siglip")
    encoder.dinov2.save_pretrained(folder / "dinov2")
    return folder


@pytest.fixture
def encoders(models) -> list[str]:
    return [f"--{name}={models / name}" for name in ("siglip", "dinov2")] + [f"--adapter={models}/adapter.safetensors"]


@pytest.fixture
def generate(models, encoders, tmp_path):
    """Runs ``generate`` with small settings; returns the exit status and the picture's path."""

    def run(*arguments: object) -> tuple[int, Path]:
        output = tmp_path / "out.png"
        settings = ["--prompt=a fox", f"--output={output}", "--steps=2", "--size=48x32", "--seed=5"]
        return main(["generate", *settings, f"--model={models / 'flux'}", *encoders, *map(str, arguments)]), output

    return run


@pytest.fixture
def error_line(capsys) -> Callable[[], str]:
    """Returns the line that was printed as the error, the only one that belongs to no progress bar."""

    def read() -> str:
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return read


@pytest.fixture
def no_models(monkeypatch):
    """Fails the test if a model is loaded."""
    for model in (CharacterEncoder, CharacterAdapter, InstantCharacterPipeline):
        for name in {"from_file", "from_pretrained"} & set(dir(model)):
            monkeypatch.setattr(model, name, lambda *_, **__: pytest.fail("a model was loaded"))
