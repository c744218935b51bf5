"""Bad files made of good ones: bytes that are cut, flipped and inserted, headers and JSON that state something else."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

ODD_NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 7, 255, 2**31, 2**40, 2**62, 2**63, 10**9, 10**30, 1e30, 0.5])
ODD_TEXTS = st.sampled_from(
    ["", "a", "F32", "weight", "\x00", "\x1b[31mred", "\ud800", "../../x", "é" * 200, "[" * 3000]
)
ODD = st.one_of(
    ODD_NUMBERS,
    ODD_TEXTS,
    st.none(),
    st.booleans(),
    st.sampled_from([float("nan"), float("inf"), -1e39, [], {}, [[]], [0], {"a": 1}, [None], ["os", "system"]]),
    st.recursive(st.integers(-2, 2), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)
NUMPY = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "U8": np.uint8, "I64": np.int64}


@st.composite
def edited_bytes(draw: st.DrawFn, data: bytes, header: int) -> bytes:
    """Some bytes with one to three edits, most of them in the header, which is so many bytes long."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        end = draw(st.sampled_from([min(header, len(changed)), len(changed)]))
        at = draw(st.integers(0, max(end - 1, 0)))
        match draw(st.sampled_from(["cut", "flip", "set", "insert", "remove", "repeat", "add"])):
            case "cut":
                del changed[at:]
            case "flip" if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if changed:
                changed[at] = draw(st.sampled_from([0, 1, 0x2E, 0x63, 0x7F, 0x80, 0xFF]))
            case "insert":
                changed[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del changed[at : at + draw(st.integers(1, 64))]
            case "repeat":
                changed[at:at] = changed[at : at + draw(st.integers(1, 64))]
            case "add":
                changed += draw(st.binary(min_size=1, max_size=9))
    return bytes(changed)


@st.composite
def edited_json(draw: st.DrawFn, value: Any, odd: st.SearchStrategy = ODD) -> Any:
    """A JSON value in which one to three parts are other ones, missing, or more."""
    changed = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place, key = changed, None
        while isinstance(place, (dict, list)) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 3)) == 0:
                break
            place = inner
        match draw(st.sampled_from(["set", "set", "set", "remove", "add", "all"])):
            case "set" if key is not None:
                place[key] = copy.deepcopy(draw(odd))
            case "remove" if key is not None:
                del place[key]
            case "add" if isinstance(place, dict):
                place[draw(ODD_TEXTS)] = copy.deepcopy(draw(odd))
            case "all" if draw(st.integers(0, 4)) == 0:
                changed = copy.deepcopy(draw(odd))
    return changed


@st.composite
def json_bytes(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON file with other content, in another encoding, too deep, or with edited bytes."""
    text = json.dumps(draw(edited_json(value)))
    kind = draw(st.sampled_from(["utf-8"] * 6 + ["utf-16", "utf-8-sig", "latin", "deep", "bytes"]))
    if kind == "deep":
        return b"[" * 100_000
    if kind == "bytes":
        return draw(edited_bytes(json.dumps(value).encode(), 1 << 30))
    return text.encode() + b"\xff" if kind == "latin" else text.encode(kind)


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its tensors' bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined_safetensors(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@st.composite
def edited_safetensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with edited bytes, header, metadata or numbers."""
    header, body = split_safetensors(data)
    kind = draw(st.sampled_from(["bytes", "header", "entry", "metadata", "numbers", "numbers"]))
    if kind == "bytes":
        return draw(edited_bytes(data, len(data) - len(body)))
    if kind == "metadata" and "__metadata__" in header:
        header["__metadata__"] = draw(edited_json(header["__metadata__"]))
    elif kind == "numbers":
        body = draw(edited_numbers(body))
    elif kind == "entry":
        key = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        header = draw(edited_entry(header, key))
    else:
        header = draw(edited_json(header))
    return joined_safetensors(header, body)


@st.composite
def edited_entry(draw: st.DrawFn, header: dict[str, Any], key: str) -> dict[str, Any]:
    """A header in which a tensor is of another dtype or shape that has as many bytes, renamed, or shared."""
    changed = copy.deepcopy(header)
    entry, other = changed[key], draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    first, last = entry["data_offsets"]
    match draw(st.sampled_from(["dtype", "shape", "rename", "share", "empty"])):
        case "dtype":
            name, size = draw(
                st.sampled_from(
                    [("I64", 8), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("C64", 8), ("F64", 8), ("F16", 2)]
                )
            )
            changed[key] = {**entry, "dtype": name, "shape": [(last - first) // size]}
        case "shape":
            changed[key]["shape"] = draw(st.sampled_from([[1, *entry["shape"]], entry["shape"][::-1], [-1], []]))
        case "rename":
            changed[draw(ODD_TEXTS)] = changed.pop(key)
        case "share":
            changed[other] = copy.deepcopy(entry)
        case "empty":
            changed[key] = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [first, first]}
    return changed


@st.composite
def edited_numbers(draw: st.DrawFn, body: bytes) -> bytes:
    """Bytes of float32 numbers, some of which are not finite, huge, or any."""
    numbers = np.frombuffer(body[: len(body) // 4 * 4], np.float32).copy()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(numbers) - 1, 0)))
        numbers[at : at + draw(st.sampled_from([1, 1000]))] = draw(
            st.sampled_from([np.nan, np.inf, -np.inf, 1e38, -1e20, 1e10, 0.0, 1.5])
        )
    return numbers.tobytes() + body[len(numbers) * 4 :]


def content_of_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, read without safetensors; those of :data:`NUMPY`'s dtypes."""
    header, body = split_safetensors(data)
    return {
        key: np.frombuffer(body[slice(*entry["data_offsets"])], NUMPY[entry["dtype"]]).reshape(entry["shape"])
        for key, entry in header.items()
        if key != "__metadata__" and entry["dtype"] in NUMPY
    }


def same(tensor: Tensor, array: np.ndarray | None) -> bool:
    """Whether a tensor has the numbers of an array."""
    return (
        array is not None
        and tuple(tensor.shape) == array.shape
        and np.array_equal(tensor.detach().float().numpy(), array)
    )


def finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors)


def write(path: Path, data: bytes, call: Callable[[Path], Any]) -> Callable[[], Any]:
    """A call that writes a file, then hands it to ``call``."""

    def run() -> Any:
        path.write_bytes(data)
        return call(path)

    return run
