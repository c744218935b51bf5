"""Pickles that would run code: nothing is run, and the error says what the file wanted."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from instantcharacter.files.reading import read_pickle

CODE = {
    "os system": "touch {}",
    "posix system": "touch {}",
    "subprocess call": "touch {}",
    "builtins eval": "open({!r}, 'w')",
    "builtins exec": "open({!r}, 'w')",
    "__builtin__ eval": "open({!r}, 'w')",
    "os mkdir": "{}",
    "pathlib Path": "{}",
    "torch load": "{}",
    "torch.serialization load": "{}",
    "torch.jit load": "{}",
    "torch.storage _load_from_bytes": "{}",
    "torch._utils _rebuild_wrapper_subclass": "{}",
    "torch._tensor _rebuild_from_type_v2": "{}",
    "torch.utils._sympy.functions eval": "{}",
    "numpy load": "{}",
    "numpy.core.multiarray _reconstruct": "{}",
    "instantcharacter.files.reading read_json": "{}",
    "collections OrderedDict.__init__": "{}",
    "functools partial": "{}",
    "operator attrgetter": "{}",
    "importlib import_module": "{}",
    "runpy run_path": "{}",
    "webbrowser open": "{}",
    "\x1b[31mred code": "{}",
}
"""Functions, and what each is called with, ``{}`` being the path of a mark that they leave."""


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def forms(function: str, argument: str) -> dict[str, bytes]:
    """Programs that call a function, in the ways that pickles have."""
    module, _, name = function.partition(" ")
    by_name, stacked = f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"
    call = text(argument) + b"\x85R"
    inside = b"}" + text("image_proj")
    return {
        "GLOBAL, REDUCE": b"\x80\x02" + by_name + call + b".",
        "STACK_GLOBAL, REDUCE": b"\x80\x04" + stacked + call + b".",
        "in a dictionary": b"\x80\x02" + inside + by_name + call + b"s.",
        "as a key": b"\x80\x02}" + by_name + call + b"Ns.",
        "in a list": b"\x80\x02](" + by_name + call + b"e.",
        "INST": b"\x80\x02(" + text(argument) + f"i{module}\n{name}\n".encode() + b".",
        "OBJ": b"\x80\x02(" + by_name + text(argument) + b"o.",
        "NEWOBJ": b"\x80\x02" + by_name + text(argument) + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + by_name + text(argument) + b"\x85}\x92.",
        "protocol 0": f"c{module}\n{name}\n(V{argument}\ntR.".encode("raw_unicode_escape"),
        "behind a memo": b"\x80\x02" + by_name + b"q\x00h\x00" + call + b".",
        "before the end": b"\x80\x02" + by_name + call + b"0}.",
        "after the end": b"\x80\x02}." + by_name + call + b".",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R" + inside + by_name + call + b"sb.",
        "as a hook": b"\x80\x02ctorch._utils\n_rebuild_parameter\n(N\x89" + by_name + call + b"tR.",
        "a reference": b"\x80\x02" + text("storage") + by_name + call + b"\x86Q.",
        "as a storage": b"\x80\x02(" + text("storage") + by_name + text("0") + text("cpu") + b"K\x01tQ.",
        "framed": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + stacked + call + b".",
    }


FORMS = list(forms("os system", ""))
SAFE = {"after the end"}
"""Forms of which pickle, too, reads no more than the beginning."""


def archive(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_code_is_not_run_in_any_form(tmp_path, form):
    mark = tmp_path / "was_run"
    for function, argument in CODE.items():
        path = archive(tmp_path / "bad.bin", forms(function, argument.format(str(mark)))[form])
        if form in SAFE:
            assert read_pickle(path, "tensors") == {}
            continue
        with pytest.raises(ValueError, match=r"bad\.bin cannot be read.*Expected tensors") as refused:
            read_pickle(path, "tensors")
        message = str(refused.value)
        assert "weights_only" not in message
        assert message.isprintable()
        assert not mark.exists(), (form, function)


@pytest.mark.parametrize("function", [function for function in CODE if function.isprintable()])
def test_the_error_says_what_the_file_wanted(tmp_path, function):
    path = archive(tmp_path / "bad.bin", forms(function, "x")["GLOBAL, REDUCE"])
    name = function.replace(" ", ".")
    with pytest.raises(ValueError, match=f"tensors alone: it asks to run {name}, which is not done"):
        read_pickle(path, "tensors")


def test_these_forms_do_run_in_pickle(tmp_path):
    """The programs are whole: Python's pickle runs most of them."""
    ran = []
    for form, program in forms("os mkdir", str(tmp_path / "was_run")).items():
        with suppress(pickle.UnpicklingError, TypeError, AttributeError, ValueError, OSError):
            pickle.Unpickler(io.BytesIO(program)).load()
        if (tmp_path / "was_run").exists():
            ran.append(form)
            (tmp_path / "was_run").rmdir()
    assert len(ran) > 6, ran


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2**31 places
        b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",  # lists in lists
        b"\x80\x02N" + b"\x85" * 1_000_000 + b"q\x00h\x00.",
        b"\x80\x02]" + b"q\x00(h\x00h\x00e" * 60 + b".",  # a list that holds itself
        b"\x80\x02N" + b"\x85q\x00h\x00\x86" * 60 + b"}q\x01h\x00Nsh\x01.",  # a key whose hash is never done
        b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"1.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"1.",
        b"\x80\x02(((((((((.",
        b"",
        b".",
    ],
    ids=range(10),
)
def test_programs_that_want_memory_or_time_end(tmp_path, program):
    path = archive(tmp_path / "bad.bin", program)
    try:
        read_pickle(path, "tensors")
    except ValueError as error:
        assert "bad.bin" in str(error)


def test_what_torch_writes_is_read(tmp_path):
    linear = torch.nn.Linear(4, 3)
    content = {
        "state": linear.state_dict(),
        "parameter": linear.weight,
        "half": torch.arange(6).half().reshape(2, 3),
        "bfloat16": torch.arange(3).bfloat16(),
        "fp8": torch.ones(3).to(torch.float8_e4m3fn),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "slice": torch.arange(9.0)[2:5],
        "size": torch.Size([2, 3]),
        "plain": [1, -2, 2**40, 1.5, None, True, "é", (1, (2,)), {}],
        7: "a number as a key",
    }
    torch.save(content, tmp_path / "a.bin")
    read = read_pickle(tmp_path / "a.bin", "tensors")
    assert read.keys() == content.keys()
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(read[key].float(), value.detach().float()), key
            assert read[key].dtype == value.dtype
            assert read[key].stride() == value.stride()
        elif key == "state":
            assert all(torch.equal(read[key][name], weight) for name, weight in value.items())
        else:
            assert read[key] == value


def test_short_storages_are_refused(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "short.bin", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:200] if name.endswith("data/0") else old.read(name))
    with pytest.raises(ValueError, match=r"short\.bin cannot be read .*a tensor has 400 bytes, and no part"):
        read_pickle(tmp_path / "short.bin", "tensors")
