"""The commands ``convert`` and ``download``: model files."""

from __future__ import annotations

from ..files import catalog, folders
from ..files.atomic import check_writable
from ..files.download import adapter_file, fetch
from .checks import check_source
from .options import ConvertOptions, DownloadOptions
from .progress import byte_bar, stage_bar


def convert(options: ConvertOptions) -> None:
    """Write an adapter as ``.safetensors`` beside the original, or as ``--output``; with ``--folded``, folded.

    Raises:
        FileExistsError: the output exists.
        OSError: no such adapter, or the output's folder cannot be written.
        ValueError: the adapter's file is not one, the output's suffix is neither .safetensors nor .bin, a folded
            adapter is to be folded or written as .bin.
    """
    check_source("adapter", options.adapter)
    source = adapter_file(options.adapter)
    output = options.output or source.with_name(f"{source.stem}{'-folded' * options.folded}.safetensors")
    endings = (".safetensors",) if options.folded else (".safetensors", ".bin")
    if output.suffix not in endings:
        raise ValueError(f"--output {output}: expected a name that ends in {' or '.join(endings)}")
    if output.exists():
        raise FileExistsError(f"{output} is there already: delete it, or name another with --output")
    check_writable(output)
    import torch

    from ..model.adapter import CharacterAdapter
    from ..model.folding import fold_adapter
    from ..offload.devices import default_device

    dtype = getattr(torch, options.dtype) if options.dtype else None
    with stage_bar("convert", 3 if options.folded else 2) as start:
        start("reading")
        adapter = CharacterAdapter.from_file(source, dtype=None if options.folded else dtype)
        if options.folded:
            start("folding")
            adapter = fold_adapter(adapter, dtype or torch.bfloat16, default_device())
        start("writing")
        adapter.save(output)
    print(f"wrote {output}")


def download(options: DownloadOptions) -> None:
    """Download model files into ComfyUI's folders, except files that are there already, and print their paths.

    Raises:
        FileNotFoundError: there is no ComfyUI to be found, or no such models folder.
        OSError: the hub cannot be reached, refuses, or the disk is full.
    """
    comfyui = folders.comfyui_folder()
    models = options.models or (comfyui and comfyui / "models")
    if models is None or not models.is_dir():
        found = f"there is no folder {models}" if models else "this pack is in no ComfyUI"
        raise FileNotFoundError(f"{found}: give ComfyUI's models folder with --models")
    searched = folders.model_folders(models)
    for name in options.file or catalog.FILES:
        file = catalog.FILES[name]
        path = folders.find(file, searched)
        if path is None:
            with byte_bar(file.title) as report:
                path = fetch(file, folders.save_folder(file, searched, models), report)
        print(f"{name}: {path}")
