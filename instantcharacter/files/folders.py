"""Search of ComfyUI's model folders, through links, for files of the catalogue."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .catalog import FILES, FLUX, ModelFile

OLD_NAMES = {"diffusion_models": ("unet",), "text_encoders": ("clip",)}
"""ComfyUI's folders → their older names, which it searches too."""
TOKENIZERS = ("comfy/sd1_tokenizer", "comfy/text_encoders/t5_tokenizer")
"""Folders of ComfyUI's source with the vocabularies of CLIP and T5."""
HUB_TOKENIZERS = (
    *(f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")),
    *(f"tokenizer_2/{name}" for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")),
)
"""Files of FLUX.1-dev's repository with the same vocabularies."""
SNAPSHOT = re.compile(r"models--[^/]+--([^/]+)/snapshots/[^/]+")
"""The path of a repository's version in a hub cache."""


def match(file: ModelFile, names: Iterable[str]) -> str | None:
    """The name under which a folder has a model file, or None.

    Args:
        file: one of :data:`~.catalog.FILES`.
        names: paths in the folder, of any depth. A snapshot in a hub cache counts as a folder of its repository's
            name. What lies in a folder ``….part`` is not whole.

    Returns:
        The first of ``names`` that ends in the file's own path, or else in another of its names.
    """
    posix = {f"/{name}".replace("\\", "/"): name for name in names}
    paths = {SNAPSHOT.sub(r"\1", path): name for path, name in posix.items() if ".part/" not in path}
    for end in (file.saved_as.as_posix(), *file.names):
        for path, name in paths.items():
            if path.endswith(f"/{end}"):
                return name
    return None


def find(file: ModelFile, folders: Mapping[str, Iterable[str | Path]]) -> Path | None:
    """The path of a model file, or None.

    Args:
        file: one of :data:`~.catalog.FILES`.
        folders: the directories of each of ComfyUI's folders; they are searched with their subfolders, through links.
    """
    for directory in (Path(d) for folder in file.searched for d in folders.get(folder, ())):
        names = sorted(os.path.relpath(path, directory) for path in _files(directory))
        if name := match(file, names):
            return directory / name
    return None


def comfyui_folder(*paths: Path) -> Path | None:
    """The ComfyUI above the pack, the working directory, or one of these paths, the first that there is; or None."""
    real = Path.cwd()
    shell = Path(os.environ.get("PWD", ""))  # the working directory by the links of the user's path
    linked = shell if shell.exists() and shell.samefile(real) else real
    for path in (Path(__file__).absolute(), linked, real, *(path.absolute() for path in paths)):
        for folder in (path, *path.parents):
            if (folder / "custom_nodes").is_dir() and (folder / "models").is_dir():
                return folder
    return None


def model_folders(models: str | Path) -> dict[str, list[Path]]:
    """The directories of each of ComfyUI's folders.

    Args:
        models: its ``models`` folder. An ``extra_model_paths.yaml`` beside it adds directories.

    Raises:
        ValueError: an ``extra_model_paths.yaml`` that ComfyUI cannot read either.
    """
    names = {name for file in FILES.values() for name in file.searched}
    folders = {name: [Path(models, name), *(Path(models, old) for old in OLD_NAMES.get(name, ()))] for name in names}
    for name, directory, first in _extra_folders(Path(models).absolute().parent / "extra_model_paths.yaml"):
        directories = folders.setdefault(name, [])
        directories.insert(0 if first else len(directories), directory)
    return folders


def tokenizers(*paths: Path) -> tuple[Path, Path]:
    """The folders with the vocabularies of CLIP and T5: of a ComfyUI, see :func:`comfyui_folder`, or of the hub.

    Raises:
        OSError: no ComfyUI, and the hub cannot be reached, or FLUX.1-dev's licence is not accepted.
    """
    comfyui = comfyui_folder(*paths)
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
    """The directory to download a file to: the first searched one with its folder's name, else that in ``models``."""
    searched = (Path(path) for name in file.searched for path in folders.get(name, ()))
    return next((path for path in searched if path.name == file.folder), Path(models, file.folder))


def _extra_folders(path: Path) -> list[tuple[str, Path, bool]]:
    """The directories of an ``extra_model_paths.yaml``: folder's name, directory, whether it comes first."""
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
    """The files in a directory and its subfolders, through links; a link to a directory above is not followed."""
    real = os.path.realpath(directory)
    try:
        entries = [] if real in above else list(os.scandir(directory))
    except OSError:  # no such directory, or no permission
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry.path, (*above, real))
        elif entry.is_file():
            yield entry.path
