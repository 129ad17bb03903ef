"""Intervals: they hold the true mean as often as they say, and are not there where they cannot."""

import math

import numpy as np
import pytest

from ipx2p.eval import intervals
from ipx2p.eval.intervals import (
    LEAST,
    NORMAL,
    Difference,
    Estimate,
    _drawn,
    differences,
    estimates,
    paired,
    share,
)

DRAW = {  # what differs from picture to picture, with a mean of 1
    "normal": lambda random, size: random.normal(1, 1, size),
    "exponential": lambda random, size: random.exponential(1, size),
    "left-skewed": lambda random, size: 2 - random.gamma(2, 0.5, size),
    "log-normal": lambda random, size: np.exp(random.normal(-0.125, 0.5, size)),
}


def coverage(kind, pictures, seeds, runs, *, incomplete=False):
    """How often intervals hold the true mean: pictures, and seeds with a spread of their own."""
    random = np.random.default_rng([pictures, seeds, runs])
    values = DRAW[kind](random, (runs, pictures, 1)) + random.normal(
        0, 0.5, (runs, pictures, seeds)
    )
    if incomplete:
        values[:, ::2, -1] = np.nan
    found = estimates(values.reshape(runs, -1), np.repeat(np.arange(pictures), seeds))
    return np.mean([one.low <= 1 <= one.high for one in found])


@pytest.mark.parametrize("pictures", [10, 25, 50])
@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_95_percent_intervals_hold_the_mean_in_93_to_97_percent(kind, pictures):
    assert 0.93 <= coverage(kind, pictures, 3, 2000) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [10, 20, 50])
@pytest.mark.parametrize("kind", [*DRAW])
@pytest.mark.parametrize(("seeds", "incomplete"), [(1, False), (4, True)])
def test_coverage_in_many_draws(kind, pictures, seeds, incomplete):
    covered = [coverage(kind, pictures, seeds, 4000 + n, incomplete=incomplete) for n in range(4)]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_the_interval_is_that_of_a_loop_over_draws(monkeypatch):
    monkeypatch.setattr(intervals, "MOST_DRAWS", 1999)
    monkeypatch.setattr(intervals, "EXACT", 0)
    _drawn.cache_clear()
    random = np.random.default_rng(1)
    edits = [3, 1, 2, 2, 3, 1, 4]
    pictures = np.repeat(np.arange(len(edits)), edits)
    values = random.exponential(1, len(pictures))
    rows = [values[pictures == picture] for picture in range(len(edits))]

    def mean_and_error(drawn):
        """Of a ratio: Cochran, Sampling Techniques, 1977, sec. 2.11, without n / (n - 1)."""
        count = sum(len(row) for row in drawn)
        mean = sum(row.sum() for row in drawn) / count
        return mean, math.sqrt(sum((row.sum() - mean * len(row)) ** 2 for row in drawn)) / count

    mean, error = mean_and_error(rows)
    t = []
    for counts in _drawn(len(edits))[0]:
        drawn = [row for row, count in zip(rows, counts, strict=True) for _ in range(int(count))]
        m, e = mean_and_error(drawn)
        # A picture that is drawn alone has no spread, but for what rounding leaves.
        t.append((m - mean) / e if e > 1e-9 else math.copysign(math.inf, m - mean))
    t.sort()
    low, high = (mean - t[math.ceil(part * len(t)) - 1] * error for part in (0.975, 0.025))
    [one] = estimates(values[None], pictures)
    assert (one.mean, one.low, one.high) == pytest.approx((mean, low, high))
    assert one.mean == pytest.approx(values.mean())
    _drawn.cache_clear()


def test_the_interval_of_few_pictures_is_that_of_all_draws():
    """Seven values for which 1999 draws give ends far from those of all 7^7."""
    values = np.array([21.4, 21.9, 22.0, 22.3, 22.4, 22.9, 23.6])
    mean, error = values.mean(), values.std() / math.sqrt(7)
    drawn = values[np.stack(np.unravel_index(np.arange(7**7), (7,) * 7), axis=1)]
    spread = drawn.std(axis=1) / math.sqrt(7)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(drawn.mean(axis=1) == mean, 0, (drawn.mean(axis=1) - mean) / spread)
    exact = [mean - np.quantile(t, part) * error for part in (0.975, 0.025)]
    for order in (values, values[::-1]):
        [one] = estimates(order[None], np.arange(7))
        assert (one.low, one.high) == pytest.approx(exact, abs=0.01)


def test_intervals_are_the_same_every_time_and_of_each_metric_alone():
    values = np.random.default_rng(0).normal(size=(3, 12))
    together = estimates(values, np.arange(12))
    _drawn.cache_clear()
    assert together == estimates(values, np.arange(12))
    for row, one in zip(values, together, strict=True):
        [alone] = estimates(row[None], np.arange(12))
        assert vars(alone) == pytest.approx(vars(one), rel=1e-12)


def test_edits_without_a_metric_count_as_if_they_were_not_there():
    values = np.random.default_rng(0).normal(size=(2, 14))
    values[1, [0, 5, 9]] = np.nan
    there = ~np.isnan(values[1])
    [_, one] = estimates(values, np.arange(14))
    assert [one] == estimates(values[1:, there], np.arange(there.sum()))
    assert estimates(np.full((1, 14), np.nan), np.arange(14)) == [None]


@pytest.mark.parametrize("seeds", [1, 50])
@pytest.mark.parametrize("pictures", [1, LEAST - 1])
def test_a_few_pictures_have_no_interval_however_many_seeds(pictures, seeds):
    values = np.random.default_rng(0).normal(size=(1, pictures * seeds))
    [one] = estimates(values, np.repeat(np.arange(pictures), seeds))
    assert one == Estimate(pytest.approx(values.mean()))


def test_equal_values_have_an_interval_of_zero_width():
    assert estimates(np.zeros((1, 9)), np.arange(9)) == [Estimate(0.0, 0.0, 0.0)]
    [one] = estimates(np.full((1, 9), 0.1), np.arange(9))
    assert one.low == one.high == one.mean == pytest.approx(0.1)


def test_values_that_are_nearly_all_equal_have_no_interval():
    values = np.zeros((1, 20))
    values[0, 3] = 1.0  # a third of the draws lack it
    assert estimates(values, np.arange(20)) == [Estimate(0.05)]


def test_the_mean_with_identical_pictures_is_infinite_and_has_no_interval():
    values = np.array([[math.inf, *range(8)], [*range(9)]])
    infinite, finite = estimates(values, np.arange(9))
    assert infinite == Estimate(math.inf) and finite.low is not None


def differ(one, other, cases, pictures=None, digits=2, better=1):
    cases = np.array(cases)
    pairs = paired(np.array([one], float), np.array([other], float), cases)
    return differences(pairs, cases if pictures is None else pictures, cases, [digits], [better])[0]


def test_two_copies_differ_by_exactly_zero():
    values = [*np.random.default_rng(0).normal(20, 3, 11), math.inf]  # inf: identical pictures
    assert differ(values, values, range(12)) == Difference(0.0, 0.0, 0.0, 0, 12, 0)


def test_paired_intervals_are_narrower_than_those_of_the_means():
    random = np.random.default_rng(0)
    pictures = random.normal(20, 5, 30)
    one, other = pictures + random.normal(0.3, 0.2, 30), pictures
    difference = differ(one, other, range(30))
    [alone] = estimates(one[None], np.arange(30))
    assert 0 < difference.low < 0.3 < difference.high
    assert difference.high - difference.low < 0.1 * (alone.high - alone.low)


def test_infinite_on_one_side_only_has_no_interval():
    one, other = [math.inf, *range(8)], [*range(9)]
    assert differ(one, other, range(9)) == Difference(math.inf, None, None, 1, 0, 8)
    both_ways = differ([math.inf, 1, 1, 1, 1], [1, math.inf, 1, 1, 1], range(5))
    assert math.isnan(both_ways.mean) and both_ways.low is None
    assert (both_ways.wins, both_ways.ties, both_ways.losses) == (1, 3, 1)


def test_edits_are_paired_by_seed_and_else_by_the_means_of_their_case():
    nan = math.nan
    cases = [0, 0, 1, 1, 2, 2, 2, 3]  # case 2 has no common seed, case 3 nothing to compare with
    one = [1.0, nan, 4.0, 6.0, nan, 2.0, 4.0, 9.0]
    other = [0.5, 9.0, 1.0, 2.0, 7.0, nan, nan, nan]
    pairs = paired(np.array([one]), np.array([other]), np.array(cases))
    np.testing.assert_equal(pairs, [[0.5, nan, 3.0, 4.0, -4.0, nan, nan, nan]])


@pytest.mark.parametrize(("better", "tally"), [(1, (1, 2, 1)), (-1, (1, 2, 1)), (0, (0, 0, 0))])
def test_a_difference_that_is_not_printed_is_a_tie(better, tally):
    difference = differ([1.004, 1.0, 1.006, 0.99], [1.0] * 4, range(4), better=better)
    assert (difference.wins, difference.ties, difference.losses) == tally


def test_lower_is_better_turns_wins_and_losses_but_no_sign():
    low = differ([1.0, 1.0, 3.0], [2.0, 2.0, 2.0], range(3), better=-1)
    assert (low.wins, low.losses) == (2, 1) and low.mean == pytest.approx(-1 / 3)


@pytest.mark.parametrize(("wins", "total"), [(0, 7), (7, 7), (13, 40), (20.5, 41)])
def test_ends_of_a_share_are_where_the_share_is_just_possible(wins, total):
    """Wilson: |share - p| = z sqrt(p (1 - p) / n) at both ends p."""
    one = share(wins, total)
    for end in (one.low, one.high):
        error = NORMAL * math.sqrt(end * (1 - end) / total)
        assert abs(one.mean - end) == pytest.approx(error, abs=1e-12)
    assert 0 <= one.low <= one.mean <= one.high <= 1 and one.low < one.high


def test_no_choices_have_no_share():
    one = share(0, 0)
    assert math.isnan(one.mean) and one.low is None
