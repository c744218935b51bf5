"""Checks before anything takes long: sources that cannot be models, outputs that must not be replaced."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..files.atomic import check_replaceable, check_writable
from .options import EncodeOptions, GenerateOptions, PictureOptions

MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf", ".bin")


def check_sources(options: EncodeOptions) -> None:
    """Raise ``FileNotFoundError`` for a model that is neither on disk nor can be on the hub."""
    if isinstance(options, PictureOptions):
        check_source("--model", options.model)
    for name in ("siglip", "dinov2", "adapter"):
        check_source(f"--{name}", getattr(options, name))


def check_source(flag: str, source: str) -> None:
    """Raise ``FileNotFoundError`` unless ``source`` is a path that exists or has the form of a hub id.

    Args:
        flag: the option that named it, for the error.
        source: a path or a hub id such as ``facebook/dinov2-giant``.
    """
    if Path(source).suffix in MODEL_SUFFIXES and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source} ({flag})")
    if not source or not (Path(source).exists() or re.fullmatch(r"[\w.-]*\w/[\w.-]+", source)):
        raise FileNotFoundError(f"there is no file or folder {source!r}, nor can it be on the hub ({flag})")


def check_generate(options: GenerateOptions) -> None:
    """Raise ``ValueError`` or ``OSError`` for options of ``generate`` that contradict each other or their files."""
    references, characters = len(options.reference), len(options.reference) + len(options.character)
    if not characters:
        raise ValueError("nobody to draw: give --reference PICTURE or --character FILE")
    options.scales(characters)
    crossed = [name for name, _ in options.grid]
    if len(set(crossed)) < len(crossed):
        raise ValueError(f"--grid names {' '.join(crossed)}: name each setting once, with all its values")
    for path, _ in options.lora:
        if not path.is_file():
            raise FileNotFoundError(f"there is no LoRA file {path}")
    check_flux_files(options)
    check_picture_output(options.output, *options.reference, *(options.mask or ()))
    if options.save_character:
        check_character_output(options.save_character, *options.character)
        if references != 1:
            raise ValueError(f"--save-character keeps one character; there are {references} --reference")


def check_flux_files(options: PictureOptions) -> None:
    """Raise unless FLUX in one file comes with the files of its text encoders and VAE, and these only with a path."""
    parts = {f"--{name.replace('_', '-')}": path for name, path in options.flux_parts.items()}
    for flag, path in parts.items():
        if path and not path.is_file():
            raise FileNotFoundError(f"there is no file {path} ({flag})")
    model = Path(options.model)
    if model.is_file():
        if missing := [flag for flag, path in parts.items() if not path]:
            raise ValueError(f"{model} is FLUX alone: give {', '.join(f'{flag} FILE' for flag in missing)} too")
    elif any(parts.values()) and not model.is_dir():
        raise ValueError(f"{', '.join(flag for flag, path in parts.items() if path)}: only with --model FILE or FOLDER")


def check_picture_output(path: Path, *inputs: str | Path) -> None:
    """Raise unless a PNG can be written to ``path`` without replacing an input or another kind of file."""
    _check_output(path, ".png", "a PNG", _is_png, inputs)


def check_character_output(path: Path, *inputs: str | Path) -> None:
    """Raise unless a character can be written to ``path`` without replacing an input or another kind of file."""
    from ..model.character import is_character

    _check_output(path, ".safetensors", "a character", is_character, inputs)


def _check_output(
    path: Path, suffix: str, kind: str, is_kind: Callable[[Path], bool], inputs: tuple[str | Path, ...]
) -> None:
    if path.suffix != suffix:
        raise ValueError(f"{path}: expected a name that ends in {suffix}")
    check_writable(path)
    if path.exists() and any(path.samefile(source) for source in inputs):
        raise FileExistsError(f"{path} is what the picture is made of: choose another name")
    check_replaceable(path, kind, is_kind)


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"
