from __future__ import annotations

from itertools import pairwise

import pytest
from support import recorded

from instantcharacter.batch.groups import MOST, batches_of, fitting_size, share
from instantcharacter.offload import GIB, plan

LORA = {"lora": str(recorded.LORA)}


@pytest.fixture
def jobs(jobs_of):
    kinds = [{}, LORA, {"size": 64}, {**LORA, "size": 64}, {"size": 64, "true_cfg": 2}]
    return jobs_of(*({"prompt": f"picture {i}", **kinds[i % 5 if i % 3 else 0]} for i in range(40)))


def outputs(batches) -> list[list[str]]:
    return [[job.output for job in batch.jobs] for batch in batches]


def test_a_batch_has_lines_of_the_same_settings_in_their_order(jobs):
    batches = batches_of(jobs, 4)
    assert sorted(name for batch in outputs(batches) for name in batch) == [job.output for job in jobs]
    for batch in batches:
        assert len(batch.jobs) <= 4
        assert len({job.settings for job in batch.jobs}) == 1
        assert [job.line for job in batch.jobs] == sorted(job.line for job in batch.jobs)


def test_loras_change_as_seldom_as_they_can(jobs):
    loras = [batch.settings.lora for batch in batches_of(jobs, 4)]
    assert sum(one != other for one, other in pairwise(loras)) == 1


def test_lines_at_the_end_change_no_batch_that_is_full(jobs, jobs_of):
    batches = batches_of(jobs, 4)
    rows = [{"prompt": "first"}, *({"prompt": f"later {i}"} for i in range(5))]
    more = batches_of([*jobs, *jobs_of(*rows)], 4)
    assert [batch for batch in batches if len(batch.jobs) == 4 and batch not in more] == []


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 100])
def test_each_batch_is_in_one_share_and_shares_cost_about_the_same(jobs, processes):
    batches = batches_of(jobs, 4)
    shares = [share(batches, process, processes) for process in range(processes)]
    assert [batch for part in shares for batch in part] == batches
    costs = [sum(batch.cost for batch in part) for part in shares]
    assert max(costs) <= sum(costs) / processes + max(batch.cost for batch in batches)


def test_nothing_is_shared_of_nothing():
    assert share([], 0, 2) == []


@pytest.mark.parametrize(("size", "gib", "fitting"), [(1024, 80, MOST), (1024, 24, 2), (2048, 8, 1)])
def test_as_many_fit_at_once_as_leave_the_weights_where_they_are(jobs_of, size, gib, fitting):
    jobs = jobs_of({"prompt": "a", "size": 256}, {"prompt": "b", "size": size})
    assert fitting_size(plan(vram_bytes=gib * GIB), jobs) == fitting
