"""The model files in ComfyUI's folders: lists for the nodes, paths of choices, downloads of missing files."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import folder_paths

from ..files.catalog import FILES, TOY, ModelFile, toy
from ..files.download import fetch
from ..files.folders import TOKENIZERS, match, save_folder
from ..files.names import check_path
from ..files.reading import read_json

DOWNLOAD = "download"
"""The choice of a list that uses the usual file, and downloads it if it is missing."""
OWN_FOLDERS = ("ipadapter", "clipvision", "characters")
"""Model folders that this pack adds to ComfyUI's."""
BACKGROUND_REMOVAL, BIREFNET = "background_removal", "birefnet.safetensors"
"""ComfyUI's folder of background removal models, and the usual one."""
SUFFIXES = {
    "flux": (".safetensors", ".sft", ".gguf"),
    "adapter": (".bin", ".safetensors"),
}
"""The file name endings in a list, if they are not ``.safetensors`` alone."""
PARTS = {"flux": "transformer", "clip_l": "text_encoder", "t5": "text_encoder_2", "vae": "vae"}
"""The subfolder of each model in a diffusers folder of FLUX."""
DRIVE = re.compile("^[A-Za-z]:(?=/)")
"""A drive of Windows at the beginning of a path."""
CHARACTER_BYTES = 200
"""Limit of a character's name in bytes: the file name adds ``.safetensors`` and the ending of a partial file."""


def register() -> None:
    """Add the pack's model folders to ComfyUI's, next to those in ``extra_model_paths.yaml``."""
    for name in OWN_FOLDERS:
        paths, endings = folder_paths.folder_names_and_paths.get(name, ([], set()))
        own = os.path.join(folder_paths.models_dir, name)  # noqa: PTH118 - ComfyUI's paths are strings
        paths = paths if own in paths else [*paths, own]
        folder_paths.folder_names_and_paths[name] = (paths, set(endings) | folder_paths.supported_pt_extensions)


def choices(name: str) -> list[str]:
    """The choices of a list for one of :data:`~instantcharacter.files.catalog.FILES`, the node's default first.

    The default is the usual file, or :data:`DOWNLOAD` if it is missing; it is never another model's file.
    """
    options = [*_listed(name), DOWNLOAD]
    default = _usual(name) or DOWNLOAD
    return [default, *(option for option in options if option != default)]


def locate(name: str, choice: str, progress: Callable[[int, int], None] | None = None, token: str = "") -> Path:
    """The path of a choice for one of :data:`~instantcharacter.files.catalog.FILES`.

    Args:
        name: the key of the file in ``FILES``.
        choice: from :func:`choices`, or :data:`~instantcharacter.files.catalog.TOY`. :data:`DOWNLOAD` uses the usual
            file, and downloads it if no folder has it.
        progress: see :func:`~instantcharacter.files.download.fetch`.
        token: see there.

    Raises:
        FileNotFoundError: the file was removed after it was listed.
        OSError: the download failed.
    """
    if choice == TOY:
        return toy(name)
    file = FILES[name]
    if choice == DOWNLOAD:
        usual = _usual(name)
        if usual is None:
            return fetch(file, _save_folder(file), progress, token)
        choice = usual
    path = _path(name, choice)
    if path is None:
        raise FileNotFoundError(
            f"{file.title}: {choice} is in none of ComfyUI's folders {', '.join(_searched(name))}. Choose another in "
            f"the list, or {DOWNLOAD} (reload the page with R to see new files)."
        )
    return path


def locate_flux(
    chosen: Mapping[str, str], progress: Callable[[int, int], None] | None = None, token: str = ""
) -> dict[str, Path | None]:
    """The paths of FLUX, its text encoders and its VAE, see :func:`locate`; None for those in FLUX's folder.

    If a file is missing, :data:`DOWNLOAD` uses a diffusers folder of FLUX.1-dev before it downloads.

    Args:
        chosen: choices for ``flux``, ``clip_l``, ``t5`` and ``vae``, from :func:`choices`.
        progress: see :func:`~instantcharacter.files.download.fetch`.
        token: see there.
    """
    downloads = [name for name, choice in chosen.items() if choice == DOWNLOAD]
    flux, folder = chosen["flux"], match(FILES["flux"], _flux_folders())
    if flux == DOWNLOAD and folder and any(_usual(name) is None for name in downloads):
        flux = folder
    path = locate("flux", flux, progress, token)
    paths: dict[str, Path | None] = {"flux": path}
    for name, choice in chosen.items():
        if name != "flux":
            in_folder = choice == DOWNLOAD and path.is_dir() and _has_weights(path / PARTS[name])
            paths[name] = None if in_folder else locate(name, choice, progress, token)
    return paths


def inside_models(typed: str) -> Path:
    """A typed path to a file or folder inside ComfyUI's model folders.

    It may be relative to the working directory (as in the earlier pack), to ComfyUI's folder, or to a model folder.

    Raises:
        ValueError: the path, or a link in it, leads outside of the model folders, or it cannot be a file's.
        FileNotFoundError: no such file or folder exists.
    """
    typed = typed.strip().replace("\\", "/")
    check_path(DRIVE.sub("", typed))
    roots = _model_folders()
    starts = (Path.cwd(), roots[0].parent, *roots)
    candidates = [Path(os.path.normpath(start / typed)) for start in starts]
    inside = [path for path in candidates if path not in roots and any(map(path.is_relative_to, roots))]
    if not inside:
        raise ValueError(f"{typed!r} is not inside ComfyUI's model folders: put the files there")
    for path in inside:
        if os.path.exists(path):  # noqa: PTH110 - Path's raises PermissionError
            _check_links(path)
            return path
    raise FileNotFoundError(f"{typed!r} is not in ComfyUI's model folders; looked for {inside[0]} and elsewhere")


def background_removal_file() -> Path | None:
    """The background removal model in ComfyUI's folder for them: the usual one, or the first; None if there is none."""
    if BACKGROUND_REMOVAL not in folder_paths.folder_names_and_paths:  # before ComfyUI had such models
        return None
    names = listed(BACKGROUND_REMOVAL)
    name = min(names, key=lambda name: (Path(name).name != BIREFNET, name), default=None)
    return Path(folder_paths.get_full_path_or_raise(BACKGROUND_REMOVAL, name)) if name else None


def character_file(name: str) -> Path:
    """The path to save a character of this name to, in ``models/characters``.

    Raises:
        ValueError: the name is empty, leads out of that folder, also through a link, or some system cannot have it.
    """
    name = name.strip().removesuffix(".safetensors").replace("\\", "/")
    check_path(name, CHARACTER_BYTES)
    folder = Path(os.path.normpath(folder_paths.get_folder_paths("characters")[0]))
    path = Path(os.path.normpath(folder / f"{name}.safetensors"))
    if not name or not path.is_relative_to(folder) or path.name.lstrip(".") == "safetensors":
        raise ValueError(f"{name!r} is no name for a character: expected letters, as in fox or friends/fox")
    _check_links(path)
    return path


def listed_character(name: str) -> Path:
    """The path of a character in the list of Load Character.

    Raises:
        FileNotFoundError: the list has no such name, whatever else is at that path.
    """
    path = folder_paths.get_full_path("characters", name) if name in listed("characters") else None
    if path is None:
        raise FileNotFoundError(f"{reprlib.repr(name)} is in none of ComfyUI's folders characters: reload the list (R)")
    return Path(path)


def deletable_character(name: str) -> Path:
    """The path of a listed character to delete: a file of a character inside ComfyUI's folders ``characters``.

    Raises:
        FileNotFoundError: see :func:`listed_character`.
        PermissionError: a link leads out of the folders.
        ValueError: the file is not a character.
    """
    from ..model.character import EXPECTED, is_character

    path = listed_character(name)
    folders = [os.path.realpath(folder) for folder in folder_paths.get_folder_paths("characters")]
    if not any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders):
        raise PermissionError(f"{name} is a link to a file elsewhere, which is not deleted: delete it there")
    if not is_character(path):
        raise ValueError(f"{name} is not deleted, since it is not {EXPECTED}")
    return path


def character_folders() -> list[str]:
    """The folders of the list of characters, for a list: ``/`` has all of them, every other those below it."""
    parents = {parent.as_posix() for name in listed("characters") for parent in Path(name).parents}
    return ["/", *sorted(parents - {"."})]


def characters_in(folder: str) -> list[str]:
    """The names of the listed characters in one of :func:`character_folders` and below it."""
    return [name for name in listed("characters") if folder == "/" or Path(name).is_relative_to(folder)]


def tokenizers() -> tuple[Path, Path]:
    """The folders of CLIP's and T5's tokenizers, which are part of ComfyUI."""
    import comfy

    clip, t5 = (Path(next(iter(comfy.__path__))).parent / folder for folder in TOKENIZERS)
    return clip, t5


def listed(folder: str) -> list[str]:
    """The names of the files in one of ComfyUI's folders, for a list."""
    return _utf8(folder_paths.get_filename_list(folder))


def _model_folders() -> list[Path]:
    """``models``, then the directories of all of ComfyUI's model folders."""
    listed = (path for paths, _ in folder_paths.folder_names_and_paths.values() for path in paths)
    return [Path(os.path.normpath(p)) for p in (folder_paths.models_dir, *listed) if Path(p).name != "custom_nodes"]


def _check_links(path: Path) -> None:
    """Raise ``ValueError`` if a link in a path leads outside of ComfyUI's model folders."""
    if not any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)) for folder in _model_folders()):
        raise ValueError(
            f"a link leads from {path} out of ComfyUI's model folders: name the folder that it leads to in "
            "extra_model_paths.yaml"
        )


def _utf8(names: Iterable[str]) -> list[str]:
    """The names that are UTF-8; file systems may have others."""
    return [name for name in names if name.encode("utf-8", "ignore").decode() == name]


def _save_folder(file: ModelFile) -> Path:
    folders = {name: folder_paths.get_folder_paths(name) for name in file.searched}
    return save_folder(file, folders, folder_paths.models_dir)


def _usual(name: str) -> str | None:
    """The listed file, or FLUX folder, that is the usual one by any of its names; None if it is missing."""
    usual = match(FILES[name], (choice for choice in _listed(name) if choice.endswith(_suffixes(name))))
    return usual or (match(FILES[name], _flux_folders()) if name == "flux" else None)


def _flux_folders() -> list[str]:
    """The listed diffusers folders of FLUX that are complete."""
    folders = [(choice, _path("flux", choice)) for choice in _listed("flux") if not choice.endswith(_suffixes("flux"))]
    return [choice for choice, path in folders if path and all(_has_weights(path / part) for part in PARTS.values())]


def _has_weights(folder: Path) -> bool:
    """Whether a model of a diffusers folder is complete: one file, or all shards of its index."""
    try:
        indexes = [read_json(path) for path in folder.glob("*.safetensors.index.json")]
        pieces = {folder / piece for index in indexes for piece in index["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # an unreadable index
        return False
    if pieces:
        return all(piece.exists() for piece in pieces)
    return any((folder / name).exists() for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"))


def _path(name: str, choice: str) -> Path | None:
    """The path of a listed file; None if it was removed."""
    directories = (directory for folder in _searched(name) for directory in folder_paths.get_folder_paths(folder))
    return next((path for path in (Path(directory, choice) for directory in directories) if path.exists()), None)


def _suffixes(name: str) -> tuple[str, ...]:
    """The endings of the listed files."""
    return SUFFIXES.get(name, (".safetensors",))


def _searched(name: str) -> tuple[str, ...]:
    return (*FILES[name].searched, *(("diffusers",) if name == "flux" else ()))


def _listed(name: str) -> list[str]:
    """The files with the right endings, and for FLUX the diffusers folders, relative to their model folders."""
    found: dict[str, None] = {}
    for folder in _searched(name):
        for directory in folder_paths.get_folder_paths(folder):
            files = _files(directory)
            folders = [str(Path(file).parent) for file in files if Path(file).name == "model_index.json"]
            whole = tuple(f"{path}{os.sep}" for path in folders)
            single = [file for file in files if file.endswith(_suffixes(name))]
            found |= dict.fromkeys(file for file in single if not file.startswith(whole))
            if name == "flux":
                found |= dict.fromkeys(folders)
    return sorted(_utf8(found))


def _files(directory: str) -> list[str]:
    """The files in a directory and its subfolders, read again only if one of the folders has changed."""
    files, folders = _walked.get(directory, ([], {}))
    if not folders or any(
        not Path(path).is_dir() or Path(path).stat().st_mtime != mtime for path, mtime in folders.items()
    ):
        files, folders = _walked[directory] = folder_paths.recursive_search(directory, [".git", ".cache"])
    return files


_walked: dict[str, tuple[list[str], dict[str, float]]] = {}
"""By directory: its files, and the modification time of each of its folders."""
