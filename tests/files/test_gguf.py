"""Headers of GGUF files that state more than the file has."""

from __future__ import annotations

import struct

import pytest

from instantcharacter.files.gguf import TENSORS, check_header

NAME = struct.pack("<Q", 1) + b"a"


def file_with(tmp_path, header: bytes, tensors: int, values: int):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + header)
    return tmp_path / "a.gguf"


def test_a_header_that_fits_its_file_is_taken(tmp_path):
    values = NAME + struct.pack("<I", 8) + NAME + NAME + struct.pack("<IIQI", 9, 4, 1, 7)
    tensor = NAME + struct.pack("<IQIQ", 1, 8, 0, 0)
    check_header(file_with(tmp_path, values + tensor + bytes(32), 1, 2))


@pytest.mark.parametrize(
    ("header", "tensors", "values", "message"),
    [
        (NAME + struct.pack("<IIQ", 9, 8, 2**40), 0, 1, "states 1099511627777 items"),
        (b"", 2**60, 0, "items"),
        (struct.pack("<Q", 2**60), 0, 1, "text of 1152921504606846976 bytes"),
        (NAME + struct.pack("<IQIQ", 1, 2**40, 0, 0), 1, 0, "reaches beyond the file"),
        (NAME + struct.pack("<IQIQ", 1, 0, 0, 0), 1, 0, "empty"),
        (NAME, 1, 0, "cut off or damaged"),
    ],
)
def test_a_header_that_states_more_than_the_file_is_refused(tmp_path, header, tensors, values, message):
    with pytest.raises(ValueError, match=message):
        check_header(file_with(tmp_path, header, tensors, values))


def test_blocks_of_tensors_are_those_of_gguf():
    gguf = pytest.importorskip("gguf")
    assert {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] for kind in TENSORS} == TENSORS
