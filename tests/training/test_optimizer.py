from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from instantcharacter.training import Source, TrainingConfig
from instantcharacter.training.optimizer import MovingAverage, new_optimizer, warm_up

CONFIG = TrainingConfig(output="output", data=(Source("pictures"),), learning_rate=1e-3, warmup=4)


def rates(config: TrainingConfig, first: int, last: int, saved_rate: float | None = None) -> list[float]:
    """The learning rates of steps ``first`` to ``last`` of a training that is resumed at ``first``."""
    optimizer = new_optimizer([nn.Parameter(torch.zeros(1))], config)
    for group in optimizer.param_groups if saved_rate else []:
        group.update(lr=saved_rate, initial_lr=saved_rate)
    schedule, found = warm_up(optimizer, config, first), []
    for _ in range(first, last):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_learning_rate_rises_linearly_and_stays():
    assert rates(CONFIG, 0, 6) == [1e-3 * part for part in (0.25, 0.5, 0.75, 1, 1, 1)]
    assert rates(replace(CONFIG, warmup=0), 0, 2) == [1e-3, 1e-3]


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_warm_up_continues(step):
    assert rates(CONFIG, step, 6) == rates(CONFIG, 0, 6)[step:]


def test_a_resumed_training_takes_the_learning_rate_of_its_config():
    assert rates(CONFIG, 2, 4, saved_rate=0.7) == rates(CONFIG, 0, 4)[2:]


def test_the_average_follows_quickly_at_first_and_slowly_later():
    weight = nn.Parameter(torch.zeros(2))
    average = MovingAverage([weight], decay=0.9)
    average.update(1)
    expected = 0.0
    for step in (2, 3, 1000):
        weight.data.fill_(1.0)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        assert average.values[0].tolist() == pytest.approx([expected] * 2)
    assert not average.values[0].requires_grad


def test_without_decay_there_is_no_average():
    average = MovingAverage([nn.Parameter(torch.zeros(2))], decay=0.0)
    average.update(1)
    assert average.values == []


def test_a_loaded_average_continues():
    weight = nn.Parameter(torch.ones(2))
    whole, resumed = MovingAverage([weight], 0.9), MovingAverage([weight], 0.9)
    whole.update(1)
    resumed.load([value.clone() for value in whole.values])
    weight.data.zero_()
    for average in (whole, resumed):
        average.update(2)
    assert torch.equal(whole.values[0], resumed.values[0])


def test_8_bit_adamw_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        new_optimizer([nn.Parameter(torch.zeros(1))], replace(CONFIG, optimizer="adamw8bit"))
