"""Writes a background removal model of ComfyUI's for a test, with zeros in it: its mask is 0.5 everywhere.

$COMFYUI_PYTHON tests/comfyui/inside/make_birefnet.py COMFYUI FILE
"""

import sys
from pathlib import Path

comfyui, file = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = ["comfyui", "--cpu"]
sys.path.insert(0, str(comfyui))

import comfy.options

comfy.options.enable_args_parsing()

import torch
from comfy.bg_removal_model import BackgroundRemovalModel
from safetensors.torch import save_file

weights = BackgroundRemovalModel(str(comfyui / "comfy/background_removal/birefnet.json")).model.state_dict()
for key, weight in weights.items():
    if weight.is_floating_point():
        weights[key] = torch.full(weight.shape, float(key.endswith("running_var")), dtype=torch.float16)
file.parent.mkdir(parents=True, exist_ok=True)
save_file({key: weight.contiguous() for key, weight in weights.items()}, file)
