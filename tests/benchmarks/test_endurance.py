"""Many pictures in one ComfyUI, at the tiny size; and what counts as wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import server as comfyui

from benchmarks.endurance import SETTINGS, Course, report

in_comfyui = pytest.mark.skipif(bool(comfyui.why_not()), reason=str(comfyui.why_not()))


@pytest.mark.slow
@pytest.mark.xdist_group("comfyui")
@in_comfyui
def test_pictures_stay_the_same_among_interruptions(tmp_path):
    command = [sys.executable, "-m", "benchmarks.endurance", "--tiny", "--pictures", "12", "--output", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=comfyui.PACK)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert "largest difference to the first picture of a setting: 0 of 255" in run.stdout


def course(outcomes=(), memory=()) -> Course:
    course = Course(host=[*memory], gpu=[0.0] * len(memory))
    course.outcomes.update(outcomes)
    return course


@pytest.mark.parametrize(
    ("outcome", "wrong"),
    [
        (("undisturbed", "equal"), False),
        (("undisturbed", "right"), False),
        (("undisturbed", "wrong"), True),
        (("undisturbed", "failed"), True),
        (("undisturbed", "stopped"), True),
        (("undisturbed", "out of memory"), True),
        (("undisturbed", "server lost"), True),
        (("interrupted", "stopped"), False),
        (("interrupted", "wrong"), True),
        (("interrupted", "out of memory"), True),
        (("full GPU", "out of memory"), False),
        (("full GPU", "failed"), True),
    ],
)
def test_an_outcome_is_wrong_unless_the_disturbance_explains_it(outcome, wrong):
    assert report(course([outcome])) == wrong


@pytest.mark.parametrize(("last", "wrong"), [(2.0, False), (2.1, False), (2.3, True)])
def test_memory_that_grows_is_wrong(last, wrong):
    assert report(course(memory=[1.0] * 10 + [2.0] * 20 + [last] * 10)) == wrong


def test_a_picture_is_compared_with_the_first_of_its_setting(tmp_path):
    one = course()

    def judge(setting, pixels):
        Image.fromarray(np.asarray(pixels, np.uint8)).save(path := tmp_path / "a.png")
        return one.judge(setting, path)

    black = np.zeros((4, 4, 3))
    assert judge(SETTINGS[0], black) == "equal"
    assert judge(SETTINGS[1], black + 9) == "equal"
    assert judge(SETTINGS[0], black + 1) == "right"
    assert judge(SETTINGS[0], black + 9) == "wrong"
    assert one.furthest == 9
