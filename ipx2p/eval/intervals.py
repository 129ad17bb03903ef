"""Confidence intervals of means over pictures and seeds, by bootstrap (layer 4)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    mean: infinite if a value is (PSNR of identical pictures). low, high: None where there is no
    interval: too few pictures, or an infinite mean.
    """

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean of paired differences, a line minus its reference, and its 95 % interval.

    wins, ties, losses: cases where the line is better, equal to all printed digits, worse; all 0
    for metrics that are neither better high nor low.
    """

    wins: int = 0
    ties: int = 0
    losses: int = 0
