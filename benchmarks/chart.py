"""A chart of memory against speed, as SVG."""

from __future__ import annotations

from typing import Any


def chart(results: dict[str, dict[str, Any]]) -> str:
    """Memory against seconds a step, as SVG."""
    points = {run: (result["reserved"], result["step"]) for run, result in results.items() if "step" in result}
    right, top = (max(values) * 1.1 for values in zip(*points.values()))
    marks = []
    for run, (gib, seconds) in points.items():
        x, y = 60 + 560 * gib / right, 330 - 300 * seconds / top
        color = "#1b7f5c" if "compile" in run else "#b3541e" if "fp8" in run else "#2b5fa8"
        label = {"none": "all of it"}.get(run, run + (" GiB" if run.isdecimal() else ""))
        marks.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="{color}"/>'
            f'<text x="{x + 8:.0f}" y="{y + (16 if run.isdecimal() else -6):.0f}" fill="{color}">{label}</text>'
        )
    ticks = [
        f'<text x="{60 + 560 * gib / right:.0f}" y="350" text-anchor="middle">{gib}</text>'
        for gib in range(0, int(right) + 1, 8)
    ] + [
        f'<text x="52" y="{334 - 300 * tenths / 10 / top:.0f}" text-anchor="end">{tenths / 10:.1f}</text>'
        for tenths in range(0, int(top * 10) + 1)
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 380" font-family="sans-serif" font-size="13">'
        '<rect width="680" height="380" fill="#fff"/><path d="M60 30V330H640" fill="none" stroke="#888"/>'
        '<text x="350" y="372" text-anchor="middle">GiB of GPU memory</text>'
        '<text x="12" y="20">seconds a step, FLUX.1-dev with a character, 1024×1024, one H100</text>'
        f"{''.join(ticks)}{''.join(marks)}</svg>\n"
    )
