"""The device of the toy trainings and measurements."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails at heads of 32 channels (torch 2.11, H100)
