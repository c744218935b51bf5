"""Constant strengths against those that change: ``python -m toy.evaluate.strengths ASSETS``.

The same held-out characters, prompts and noise are generated at each strength, one picture at a time by the pack's
pipeline, and judged as :mod:`toy.evaluate.measure` does. Right answers are coarse, so two finer figures come with them:
*likeness*, the similarity of the judge's identities of picture and reference, at most 1, and *prompt*, the probability
that the judge gives to the wanted action and scene together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from instantcharacter import CharacterAdapter, CharacterFeatures
from instantcharacter.model.strength import Scale, Strength
from toy.device import DEVICE
from toy.evaluate.measure import (
    BATCH,
    HeldOut,
    Toy,
    generate_by_pipeline,
    pipeline_with,
    random_held_out,
    right_answers,
)
from toy.world import ACTIONS, SCENES

CONSTANTS: dict[str, Scale] = {str(scale): scale for scale in (0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)}
OVER_TIME = (
    *((1.2, 0.9, 0.6), (1.5, 1.0, 0.5), (1.4, 0.9, 0.9), (1.0, 1.0, 0.4), (1.2, 1.2, 0.6)),
    *((0.6, 0.9, 1.2), (0.3, 1.0, 1.0), (0.6, 1.2, 0.6), (1.2, 0.6, 1.2)),
    *((0.6, 1.4, 0.6), (0.6, 1.2, 0.9), (0.6, 1.2, 1.2), (0.4, 1.4, 0.4), (0.6, 1.5, 0.9), (0.7, 1.3, 0.7)),
)
BY_BLOCKS = (
    *(
        (0.9, 0.9, 0.9, *factors)
        for factors in ((1.5, 0.7), (1.2, 0.8), (0.8, 1.1), (0.5, 1.2), (2.0, 0.0), (0.0, 1.3))
    ),
    *((0.6, 1.3, 0.9, 0.8, 1.1), (0.6, 1.2, 0.9, 0.5, 1.2)),
)
STRENGTHS: dict[str, Scale] = {
    **CONSTANTS,
    **{":".join(map(str, values)): Strength(*values) for values in OVER_TIME},
    **{
        f"{start}:{middle}:{end}, double {double}, single {single}": Strength(start, middle, end, double, single)
        for start, middle, end, double, single in BY_BLOCKS
    },
}
STEPS = 20
SAMPLES = 500
"""Number of samples for a standard error."""
Answers: TypeAlias = dict[str, Tensor]
"""The :data:`FIGURES` of each picture, [N]."""
FIGURES = ("identity", "action", "scene", "style", "likeness", "prompt")


def evaluate(
    assets: Path, names: list[str], count: int, steps: int, seed: int = 0
) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and figures of the table's rows.

    Constants come first. The gains of the others over them come with their standard errors, see :func:`gain`.
    """
    toy = Toy.load(assets)
    test = random_held_out(toy, count, seed)
    adapter = CharacterAdapter.from_file(assets / "adapter.safetensors").to(DEVICE)
    pipeline = pipeline_with(toy, adapter)
    each = [CharacterFeatures(*(tensor[i : i + 1] for tensor in test.features)) for i in range(count)]
    characters = [adapter.create_character(features) for features in each]
    constants: list[Answers] = []
    for name in sorted(names, key=lambda name: name not in CONSTANTS):
        rows = [{"subject_image": character, "subject_scale": STRENGTHS[name]} for character in characters]
        answers = judge(toy, test, generate_by_pipeline(pipeline, test, rows, steps))
        figures = {question: answers[question].mean().item() for question in FIGURES}
        if name in CONSTANTS:
            constants.append(answers)
        elif len(constants) > 1:
            for question in ("identity", "likeness"):
                figures[f"gain in {question}"], figures[f"± {question}"] = gain(question, answers, constants)
        yield name, figures


@torch.no_grad()
def judge(toy: Toy, test: HeldOut, pictures: Tensor) -> Answers:
    """The figures of each picture, on the CPU."""
    identity, action, scene, _ = (torch.cat(part) for part in zip(*map(toy.judge, pictures.split(BATCH))))
    answers = right_answers(toy, test, pictures)
    answers["likeness"] = (identity * test.references).sum(dim=1).cpu()
    answers["prompt"] = torch.ones(len(pictures))
    for name, names, logits in (("action", ACTIONS, action), ("scene", SCENES, scene)):
        wanted = torch.tensor([[*names].index(getattr(shot, name)) for shot in test.shots])
        answers["prompt"] *= logits.softmax(dim=1).cpu()[torch.arange(len(wanted)), wanted]
    return answers


def gain(question: str, answers: Answers, constants: Sequence[Answers]) -> tuple[float, float]:
    """What a strength adds to a figure beyond constants with the same mean ``prompt``, and its standard error.

    Between two constants both figures are interpolated; beyond all of them, the outermost counts. The error is of
    samples of the same pictures in all rows, drawn again and again.
    """

    def difference(pictures: Tensor) -> float:
        means = [
            [each[figure][pictures].mean().item() for figure in ("prompt", question)] for each in (answers, *constants)
        ]
        prompts, figures = zip(*sorted(means[1:]))
        best = np.maximum.accumulate(figures[::-1])[::-1]  # a constant that loses on both does not count
        return means[0][1] - float(np.interp(means[0][0], prompts, best))

    count, generator = len(answers["prompt"]), torch.Generator().manual_seed(0)
    samples = torch.randint(count, (SAMPLES, count), generator=generator)
    return difference(torch.arange(count)), float(np.std([difference(sample) for sample in samples]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--strengths", nargs="+", choices=STRENGTHS, default=[*STRENGTHS], metavar="STRENGTH")
    parser.add_argument("--pictures", type=int, default=250)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0, help="of the characters and prompts")
    options = parser.parse_args()
    for name, figures in evaluate(options.assets, options.strengths, options.pictures, options.steps, options.seed):
        print(json.dumps({"": name, **{key: round(value, 4) for key, value in figures.items()}}), flush=True)
