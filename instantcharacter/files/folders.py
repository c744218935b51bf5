"""Where model files are already: ComfyUI's folders, searched through links, and how a file is known in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .catalog import FILES, FLUX, ModelFile

OLD_NAMES = {"diffusion_models": ("unet",), "text_encoders": ("clip",)}
"""ComfyUI's folders that have an older name, too."""
TOKENIZERS = ("comfy/sd1_tokenizer", "comfy/text_encoders/t5_tokenizer")
"""Folders with the vocabularies of CLIP and T5, in ComfyUI's."""
HUB_TOKENIZERS = (
    *(f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")),
    *(f"tokenizer_2/{name}" for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")),
)
"""The same in FLUX.1-dev's repository, file by file."""
SNAPSHOT = re.compile(r"models--[^/]+--([^/]+)/snapshots/[^/]+")
"""A repository in a hub cache, in one of its versions."""


def match(file: ModelFile, names: Iterable[str]) -> str | None:
    """The first of a folder's file names that is this file's, or else another that it goes by; of any depth.

    A snapshot in a hub cache counts as a folder of its repository's name.
    """
    listed = {SNAPSHOT.sub(r"\1", f"/{name}".replace("\\", "/")): name for name in names}
    for wanted in (file.saved_as.as_posix(), *file.names):
        for path, name in listed.items():
            if path.endswith(f"/{wanted}"):
                return name
    return None


def find(file: ModelFile, folders: Mapping[str, Iterable[str | Path]]) -> Path | None:
    """A model file where it is already, under its own name or another that it goes by.

    Args:
        file: which.
        folders: the directories of each of ComfyUI's folders; all that is in them is searched, through links.
    """
    for directory in (Path(d) for folder in file.searched for d in folders.get(folder, ())):
        there = sorted(os.path.relpath(path, directory) for path in _files(directory))
        if name := match(file, there):
            return directory / name
    return None


def comfyui_folder(*places: Path) -> Path | None:
    """The ComfyUI that the pack is in, or else the working directory or one of these; through links, as written."""
    shell = Path(os.environ.get("PWD", ""))  # the working directory, through the links it was reached by
    there = Path.cwd()
    reached = shell if shell.exists() and shell.samefile(there) else there
    for path in (Path(__file__).absolute(), reached, there, *(place.absolute() for place in places)):
        for folder in (path, *path.parents):
            if (folder / "custom_nodes").is_dir() and (folder / "models").is_dir():
                return folder
    return None


def model_folders(models: str | Path) -> dict[str, list[Path]]:
    """The directories of each of ComfyUI's folders.

    Args:
        models: its ``models`` folder; an ``extra_model_paths.yaml`` beside it counts.

    Raises:
        ValueError: a file of that name that ComfyUI cannot read either.
    """
    names = {name for file in FILES.values() for name in file.searched}
    folders = {name: [Path(models, name), *(Path(models, old) for old in OLD_NAMES.get(name, ()))] for name in names}
    for name, directory, first in _extra_folders(Path(models).absolute().parent / "extra_model_paths.yaml"):
        known = folders.setdefault(name, [])
        known.insert(0 if first else len(known), directory)
    return folders


def tokenizers(*places: Path) -> tuple[Path, Path]:
    """The folders with CLIP's and T5's vocabularies: a ComfyUI's, see :func:`comfyui_folder`, or else the hub's.

    Raises:
        OSError: there is no ComfyUI, and the hub cannot be reached or wants FLUX.1-dev's licence accepted.
    """
    comfyui = comfyui_folder(*places)
    if comfyui and all((comfyui / folder).is_dir() for folder in TOKENIZERS):
        clip, t5 = (comfyui / folder for folder in TOKENIZERS)
        return clip, t5
    import huggingface_hub

    try:
        folders = {Path(huggingface_hub.hf_hub_download(FLUX, file)).parent for file in HUB_TOKENIZERS}
    except OSError as error:
        raise OSError(
            "the vocabularies of CLIP and T5 come with ComfyUI, and this runs in none; nor could they be fetched: "
            f"accept FLUX.1-dev's licence at {FILES['flux'].page}, run `hf auth login` and go online, once"
        ) from error
    clip, t5 = sorted(folders)
    return clip, t5


def save_folder(file: ModelFile, folders: Mapping[str, Iterable[str | Path]], models: str | Path) -> Path:
    """The directory that a file is fetched to: the first of its folder's name, else the one in ``models``."""
    known = (Path(path) for name in file.searched for path in folders.get(name, ()))
    return next((path for path in known if path.name == file.folder), Path(models, file.folder))


def _extra_folders(path: Path) -> list[tuple[str, Path, bool]]:
    """What an ``extra_model_paths.yaml`` adds, if it is there: folders' names, directories, whether they come first."""
    import yaml

    new_names = {old: new for new, olds in OLD_NAMES.items() for old in olds}
    added: list[tuple[str, Path, bool]] = []
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        for section in (sections or {}).values():
            settings: dict[str, Any] = dict(section or {})
            base: Path = path.parent / os.path.expandvars(Path(settings.pop("base_path", "")).expanduser())
            first = bool(settings.pop("is_default", False))
            for name, lines in settings.items():
                directories = [base / line.strip() for line in lines.splitlines() if line.strip()]
                added += [(new_names.get(name, name), directory, first) for directory in directories]
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not as ComfyUI expects it: {error}") from error
    return added


def _files(directory: str | Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in a directory, through links, but not in circles."""
    real = os.path.realpath(directory)
    try:
        entries = [] if real in above else list(os.scandir(directory))
    except OSError:  # it is not there, or closed to us
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry.path, (*above, real))
        elif entry.is_file():
            yield entry.path
