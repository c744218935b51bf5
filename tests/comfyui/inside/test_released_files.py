"""What the rehearsal makes is what was released: names, sizes, and layouts that ComfyUI knows. No weights are made."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import pytest
import torch
from torch import Tensor

from benchmarks.rehearsal.files import diffusers_folders, released, weights
from instantcharacter.files.catalog import FILES


class Lists:
    """In place of a writer: what each file or folder holds."""

    def __init__(self) -> None:
        self.files: dict[str, dict] = {}

    def put(self, path, make, save=None):
        self.files[str(path)] = make()


@pytest.fixture(scope="module", autouse=True)
def no_weights():
    def without(shapes, dtype):
        return {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes().items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "random_state", without)
        patch.setattr(released, "birefnet", lambda path: None)
        yield


@pytest.fixture(scope="module")
def made() -> dict[str, dict]:
    lists = Lists()
    released.write_models(Path(), lists)
    return lists.files


def gigabytes(content: dict) -> float:
    sizes = (part.nbytes if isinstance(part, Tensor) else 1e9 * gigabytes(part) for part in content.values())
    return sum(sizes) / 1e9


@pytest.mark.parametrize("name", FILES)
def test_name_and_size(made, name):
    file = FILES[name]
    assert gigabytes(made[f"{file.folder}/{file.saved_as.as_posix()}"]) == pytest.approx(file.gigabytes, rel=0.02)


def test_comfyui_knows_flux(made):
    config = comfy.model_detection.model_config_from_unet(made["unet/flux1-dev.safetensors"], "")
    assert type(config) is comfy.supported_models.Flux
    assert (config.unet_config["depth"], config.unet_config["depth_single_blocks"]) == (19, 38)


def test_comfyui_knows_the_text_encoders(made):
    kinds = [comfy.sd.detect_te_model(made[f"text_encoders/{name}.safetensors"]) for name in ("clip_l", "t5xxl_fp16")]
    assert kinds == [comfy.sd.TEModel.CLIP_L, comfy.sd.TEModel.T5_XXL]


def test_diffusers_folders_hold_flux_and_link_to_the_rest(made, tmp_path):
    lists = Lists()
    diffusers_folders.write_folders(tmp_path, lists)
    folder = tmp_path / "diffusers/FLUX.1-dev"
    assert gigabytes(lists.files[str(folder / "transformer")]) == pytest.approx(FILES["flux"].gigabytes, rel=0.02)
    links = [path.readlink().relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_symlink()]
    assert len(links) == 4
    assert {str(link) for link in links} <= set(made)
    parts = {name for name, value in json.loads((folder / "model_index.json").read_text()).items() if name[0] != "_"}
    assert parts == {path.name for path in folder.iterdir() if path.is_dir()} | {"transformer", "vae"}
