from __future__ import annotations

from instantcharacter.cli.progress import byte_bar, stage_bar


def test_stage_bar_counts_finished_stages_and_shows_the_current_one(capsys):
    with stage_bar("FLUX", 2) as start:
        start("loading")
        start("adding LoRAs")
    printed = capsys.readouterr().err
    assert "FLUX: 100%" in printed
    assert "2/2" in printed
    assert "adding LoRAs" in printed


def test_byte_bar_shows_the_reported_bytes(capsys):
    with byte_bar("SigLIP") as report:
        report(500, 2000)
        report(2000, 2000)
    printed = capsys.readouterr().err
    assert "SigLIP: 100%" in printed
    assert "2.00k/2.00k" in printed
