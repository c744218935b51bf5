from __future__ import annotations

import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from support import tiny

from instantcharacter import CharacterAdapter
from instantcharacter.cli.main import main


def test_convert_writes_safetensors_beside_the_original(tmp_path, models, monkeypatch):
    monkeypatch.setattr("instantcharacter.model.adapter.RELEASED", tiny.ADAPTER)
    adapter = tiny.tiny_adapter()
    adapter.save(tmp_path / "ip.bin")
    assert main(["convert", str(tmp_path / "ip.bin")]) == 0
    converted = CharacterAdapter.from_file(tmp_path / "ip.safetensors")
    assert converted.config == tiny.ADAPTER
    assert converted.fingerprint() == adapter.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ip.bin", "ip.safetensors"]


def test_convert_overwrites_no_file(tmp_path, models, error_line):
    source = models / "adapter.safetensors"
    before = source.read_bytes()
    assert main(["convert", str(source)]) == 2
    assert "is there already" in error_line()
    assert source.read_bytes() == before


def test_convert_casts_to_another_dtype(tmp_path, models):
    output = tmp_path / "small.safetensors"
    assert main(["convert", str(models / "adapter.safetensors"), f"--output={output}", "--dtype=bfloat16"]) == 0
    assert {p.dtype for p in CharacterAdapter.from_file(output).parameters()} == {torch.bfloat16}


def test_convert_folds_an_adapter(tmp_path, models):
    source = tmp_path / "ip.safetensors"
    source.write_bytes((models / "adapter.safetensors").read_bytes())
    assert main(["convert", str(source), "--folded"]) == 0
    folded = CharacterAdapter.from_file(tmp_path / "ip-folded.safetensors")
    assert folded.folded
    assert folded.fingerprint() == CharacterAdapter.from_file(source).fingerprint()
    assert folded.projector.resampler.proj_in.weight.dtype == folded.attention[0].to_k_ip.weight.dtype == torch.bfloat16
    exact = tmp_path / "exact.safetensors"
    assert main(["convert", str(source), "--folded", "--dtype=float32", f"--output={exact}"]) == 0
    assert {p.dtype for p in CharacterAdapter.from_file(exact).parameters()} == {torch.float32}


def test_convert_refuses_what_a_folded_adapter_cannot_be(tmp_path, models, error_line):
    source, folded = models / "adapter.safetensors", tmp_path / "folded.safetensors"
    assert main(["convert", str(source), "--folded", f"--output={tmp_path / 'folded.bin'}"]) == 2
    assert error_line().endswith("folded.bin: expected a name that ends in .safetensors")
    assert main(["convert", str(source), "--folded", f"--output={folded}"]) == 0
    assert main(["convert", str(folded), f"--output={tmp_path / 'whole.bin'}"]) == 2
    assert "a folded adapter is saved as .safetensors" in error_line()
    assert main(["convert", str(folded), "--folded"]) == 2
    assert "this adapter is folded" in error_line()
    assert [path.name for path in tmp_path.iterdir()] == ["folded.safetensors"]


def test_commands_run_without_progress_bars(models, tmp_path, monkeypatch):
    monkeypatch.setattr("instantcharacter.model.adapter.RELEASED", tiny.ADAPTER)
    disable_progress_bars()
    try:
        output = tmp_path / "converted.safetensors"
        assert main(["convert", str(models / "adapter.safetensors"), f"--output={output}"]) == 0
        assert output.is_file()
    finally:
        enable_progress_bars()
