"""The order of the samples: exact counts, exact shares, random access."""

import math

import numpy as np
import pytest

from ipx2p.data.order import Mixture, Shuffles, floor_sum, tempered

ITEMS = {"b": np.arange(3), "a": np.arange(3, 10), "c": np.arange(10, 12)}
WEIGHTS = {"a": 0.3, "b": 0.5, "c": 0.2}
TASKS = {item: task for task, items in ITEMS.items() for item in items.tolist()}


def mixture(weights=None, seed=0):
    return Mixture(ITEMS, weights or WEIGHTS, seed=seed)


def test_sums_of_floors_are_exact():
    draws = np.random.default_rng(0)
    for _ in range(500):
        count, modulus, stride, offset = draws.integers([0, 1, 0, -99], [30, 40, 99, 99]).tolist()
        expected = sum((stride * i + offset) // modulus for i in range(count))
        assert floor_sum(count, modulus, stride, offset) == expected
    # Far beyond what floats hold: the sum of (2^64 - 1) i / 2^64, rounded down, is that of i - 1.
    assert floor_sum(10**12, 2**64, 2**64 - 1, 0) == (10**12 - 1) * (10**12 - 2) // 2


def test_samples_before_any_index_are_counted_as_by_walking_there():
    order, walked = mixture(), dict.fromkeys(sorted(ITEMS), 0)
    for index in range(2000):
        assert [order.count(number, index) for number in range(3)] == [*walked.values()]
        walked[TASKS[order(index)[0]]] += 1


@pytest.mark.parametrize("seed", [0, 1])
def test_every_stretch_of_samples_has_the_shares_that_were_asked_for(seed):
    order = mixture(seed=seed)
    tasks = [TASKS[order(index)[0]] for index in range(3000)]
    for begin in range(0, 3000, 100):
        for task, share in WEIGHTS.items():
            assert abs(tasks[begin : begin + 100].count(task) - 100 * share) < 4


def test_any_sample_can_be_asked_for_first():
    walked = [mixture()(index) for index in range(50)]
    order = mixture()
    for index in (49, 3, 20, 0, 48):
        assert order(index) == walked[index]
    far = 10**12
    assert mixture()(far) == [order(far + i) for i in (2, 1, 0)][-1]


def test_a_task_shows_every_pair_once_an_epoch_in_its_own_order():
    order = mixture()
    shown = {task: [] for task in ITEMS}
    for index in range(3000):
        item, epoch = order(index)
        shown[TASKS[item]].append((epoch, item))
    for task, items in ITEMS.items():
        epochs = [epoch for epoch, _ in shown[task]]
        assert epochs == [place // len(items) for place in range(len(epochs))]
        orders = [tuple(i for e, i in shown[task] if e == epoch) for epoch in range(40)]
        assert all(sorted(found) == items.tolist() for found in orders)
        assert len({*orders}) > 1


def test_seeds_and_only_seeds_and_ratios_change_the_order():
    first = [mixture()(index) for index in range(100)]
    assert first != [mixture(seed=1)(index) for index in range(100)]
    turned = {task: 8 * WEIGHTS[task] for task in ("c", "a", "b")}
    assert first == [mixture(turned)(index) for index in range(100)]


def test_a_task_of_weight_0_is_never_shown():
    order = mixture({"a": 1, "b": 0, "c": 2})
    assert {TASKS[order(index)[0]] for index in range(300)} == {"a", "c"}


def test_shuffles_of_different_purposes_differ():
    one, other = (Shuffles(50, seed=0, purpose=purpose) for purpose in ("x", "y"))
    assert [one(i) for i in range(50)] != [other(i) for i in range(50)]


def test_temperatures_go_from_proportional_to_equal():
    counts = {"a": 900, "b": 100}

    def share(temperature):
        weights = tempered(counts, temperature)
        return weights["b"] / sum(weights.values())

    assert share(1) == pytest.approx(0.1) and share(2) == pytest.approx(0.25)
    assert share(math.inf) == 0.5 and share(0.01) < 1e-9
