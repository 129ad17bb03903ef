"""Lines of the table: the records of one model with one setting, and their means (layer 4)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ipx2p.eval.intervals import Difference, Estimate
from ipx2p.eval.records import BUILT_IN, Record

ALL = ""  # the task of lines about all pictures
SCALES = ("guidance_scale", "image_guidance_scale")
EFFECTIVE = tuple(f"effective_{name}" for name in SCALES)
TRADE_OFF = ("clip_direction", "clip_image")


@dataclass(frozen=True)
class Line:
    """One line of the table: a model with its settings, and means over its edits.

    settings: as in `Record`; None for built-in rows and for pictures made elsewhere. task: `ALL`
    for all together. pictures: photographs, which are the samples of the intervals. failed: edits
    that are not finite, and in no mean. evaluations, seconds: of one edit, a mean and a median;
    infinite if no edit is finite. scores: by metric. against: paired differences by label of the
    reference (the baseline, identity, classical), then by metric. trade_off: means over the edits
    that have both of its metrics. shared: label of the earlier line with the same edits. best:
    metrics by which its scales are the best of its scheme at this cost. remarks: what must be said
    in words. label: short, and unique in the report.
    """

    model: str
    settings: dict[str, Any] | None
    task: str
    pictures: int
    edits: int
    failed: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0
    scores: dict[str, Estimate] = field(default_factory=dict)
    against: dict[str, dict[str, Difference]] = field(default_factory=dict)
    trade_off: dict[str, float] = field(default_factory=dict)
    shared: str | None = None
    best: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    label: str = ""

    @property
    def is_built_in(self) -> bool:
        """Whether it is a row that every report has."""
        return self.model.split(" (")[0] in BUILT_IN

    @property
    def means(self) -> dict[str, float]:
        """The means of its scores."""
        return {name: score.mean for name, score in self.scores.items()}

    @property
    def scales(self) -> dict[str, float | None]:
        """Both scales by name; None for one that the guidance does not use."""
        return {name: (self.settings or {}).get(name) for name in SCALES}

    @property
    def effective(self) -> tuple[float, float] | None:
        """Both scales at which ip2p is exactly the same, or None."""
        both = tuple((self.settings or {}).get(name) for name in EFFECTIVE)
        return None if None in both else both


def make_lines(records: Sequence[Record], baseline: str | None = None) -> list[Line]:
    """The lines of all tasks together, then of each task if there are several.

    Within a task: built-in rows, then the others by cost. Best scales are chosen on the records
    that select, if there are any.

    Args:
        baseline: label or model of a line that the others are compared with, besides identity.
    Raises: InputError for an unknown baseline, or scores of one metric that were made differently.
    """
    raise NotImplementedError
