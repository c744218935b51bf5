"""comfy-aimdo's virtual memory on the pretended card: pages, watermarks and priorities as in its src/model-vbar.c."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch

PAGE = 4096


class Budget:
    pages = 10**9
    used = 0
    order: ClassVar[list[Any]] = []  # lowest priority first


class ModelVBAR:
    def __init__(self, size: int, device: Any) -> None:
        self.nr_pages = self.watermark = -(-int(size) // PAGE)
        self.pieces: dict[int, torch.Tensor] = {}
        self.device, self.max_size, self.offset, self.base_addr = device, self.nr_pages * PAGE, 0, 0
        self.handles = [False] * self.nr_pages
        self.pinned = [False] * self.nr_pages
        self.serial = [0] * self.nr_pages
        Budget.order.append(self)

    def prioritize(self) -> None:
        Budget.order.remove(self)
        Budget.order.append(self)
        self.watermark = self.nr_pages

    def alloc(self, num_bytes: int) -> Any:
        self.offset = (self.offset + 511) & ~511
        begin = self.offset
        self.offset += num_bytes
        self.pieces[begin] = torch.full((num_bytes,), 255, dtype=torch.uint8, device=self.device)
        return (self, begin, num_bytes)

    def drop(self, page: int, unpin: bool = False) -> bool:
        if not self.handles[page] or (self.pinned[page] and not unpin):
            return False
        self.handles[page] = False
        Budget.used -= 1
        torch.cuda.synchronize(self.device)
        for begin, piece in self.pieces.items():
            if begin < (page + 1) * PAGE and begin + len(piece) > page * PAGE:
                piece.fill_(255)  # NaN, whatever the type
        return True

    def fault(self, offset: int, size: int) -> Any:
        first, end = offset // PAGE, -(-(offset + size) // PAGE)
        if end > self.watermark:
            return None
        signature = (ctypes.c_uint32 * (size // PAGE + 2))()
        for k, page in enumerate(range(first, end)):
            if not self.handles[page]:
                if Budget.used >= Budget.pages:
                    self.on_out_of_memory(end)
                    if page >= self.watermark or Budget.used >= Budget.pages:
                        return None
                self.handles[page] = True
                Budget.used += 1
                self.serial[page] += 1
            signature[k] = self.serial[page]
        for page in range(first, end):
            self.pinned[page] = True
        return signature

    def on_out_of_memory(self, target: int) -> None:
        for other in Budget.order:
            while Budget.used >= Budget.pages and other.watermark > 0 and self.watermark > 0:
                if other is self and self.watermark <= target - 1 and not self.handles[self.watermark - 1]:
                    self.watermark -= 1
                    break
                other.watermark -= 1
                other.drop(other.watermark)
            if Budget.used < Budget.pages:
                return

    def unpin(self, offset: int, size: int) -> None:
        for page in range(offset // PAGE, -(-(offset + size) // PAGE)):
            self.pinned[page] = False
            if page >= self.watermark:
                self.drop(page)

    def loaded_size(self) -> int:
        return sum(self.handles) * PAGE

    def free_memory(self, size: float) -> int:
        freed = 0
        while freed * PAGE < size and self.watermark > 0:
            self.watermark -= 1
            freed += self.drop(self.watermark)
        return freed * PAGE

    def get_watermark(self) -> int:
        return self.watermark

    def __del__(self) -> None:
        if self in Budget.order:
            Budget.order.remove(self)


class VRAMBuffer:
    def __init__(self, max_size: int, device: Any) -> None:
        self.memory = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
        self.memory.untyped_storage()._place.written = None
        self.allocated = 0

    def size(self) -> int:
        return self.allocated

    def get(self, size: int, offset: int = 0) -> Any:
        self.allocated = max(self.allocated, size + offset)
        return (self, int(offset), int(size))


class HostBuffer:
    def __init__(self, size: int) -> None:
        self.size = int(size)


def aimdo_to_tensor(alloc: Any, device: Any) -> torch.Tensor:
    owner, begin, size = alloc
    if isinstance(owner, ModelVBAR):
        return owner.pieces[begin]
    return owner.memory[begin : begin + size]


def load_safetensors(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """As ComfyUI's, without the library's own memory map."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}


def install() -> None:
    import comfy.memory_management
    import comfy.model_patcher
    import comfy.utils
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar as vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    vbar.ModelVBAR = ModelVBAR
    vbar.vbar_fault = lambda alloc: alloc[0].fault(*alloc[1:])
    vbar.vbar_unpin = lambda alloc: alloc and alloc[0].unpin(*alloc[1:])
    vbar.vbars_analyze = lambda *_: 0
    comfy_aimdo.torch.aimdo_to_tensor = aimdo_to_tensor
    comfy_aimdo.torch.hostbuf_to_tensor = lambda buffer: torch.empty(buffer.size, dtype=torch.uint8).pin_memory()
    comfy_aimdo.host_buffer.HostBuffer = HostBuffer
    comfy_aimdo.vram_buffer.VRAMBuffer = VRAMBuffer
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    comfy.utils.load_safetensors = load_safetensors
