from __future__ import annotations

from pathlib import Path

import folder_paths
from utils.extra_config import load_extra_path_config

from instantcharacter.files.folders import model_folders

EXTRA = """
comfyui:
  base_path: {disk}/comfy
  unet: models/unet
  diffusion_models: |
    models/diffusion_models
    models/more/
  clip: models/clip
  clip_vision: models/clip_vision
first:
  is_default: true
  base_path: ../first
  vae: vae
  text_encoders: text_encoders
loose:
  ipadapter: ./ipadapter
  clipvision: {disk}/clipvision
nothing:
"""


def test_extra_model_paths_are_what_comfyui_makes_of_them(tmp_path, monkeypatch):
    models = tmp_path / "ComfyUI/models"
    models.mkdir(parents=True)
    written = models.parent / "extra_model_paths.yaml"
    written.write_text(EXTRA.format(disk=tmp_path / "disk"))
    ours = model_folders(models)
    theirs = {name: ([], set()) for name in ours}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", theirs)
    load_extra_path_config(written)
    for name, paths in ours.items():
        added = [path.resolve() for path in paths if not path.is_relative_to(models)]
        assert added == [Path(path) for path in theirs[name][0]], name
    assert sum(len(paths) for paths, _ in theirs.values()) == 9
