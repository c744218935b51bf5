"""FLUX as a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import weights
from .released import flux_shapes
from .writer import Writer


def write_gguf(models: Path, writer: Writer, shapes_of_flux: Callable[[], weights.Shapes] = flux_shapes) -> None:
    """FLUX with its linear layers in 8 bits (Q8_0). Nothing is quantised: each block is a scale and 32 random bytes."""
    import gguf

    byte_std = 74
    scale = torch.tensor([weights.STD / byte_std], dtype=torch.float16, device=weights.DEVICE).view(torch.uint8)

    def q8(rows: int, columns: int) -> np.ndarray:
        blocks = torch.randint(0, 256, (rows, columns // 32, 34), dtype=torch.uint8, device=weights.DEVICE)
        blocks[..., :2] = scale
        return blocks.reshape(rows, -1).cpu().numpy()

    def make() -> dict[str, np.ndarray]:
        shapes = shapes_of_flux()
        large = {key for key, shape in shapes.items() if len(shape) == 2 and shape[1] % 32 == 0}
        small = weights.random_state(lambda: {key: shapes[key] for key in shapes if key not in large}, torch.float32)
        return {key: q8(*shapes[key]) if key in large else small[key].numpy() for key in shapes}

    def save(state: dict[str, np.ndarray], path: Path) -> None:
        file = gguf.GGUFWriter(path, "flux")
        for key, array in state.items():
            file.add_tensor(key, array, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if array.dtype == np.uint8 else None)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()

    writer.put(models / "unet/flux1-dev-Q8_0.gguf", make, save)
