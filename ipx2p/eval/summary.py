"""Few numbers of many records: the end of a training, and the answer to a question (layer 4).

A question has variants, each trained with several seeds. The runs of a variant are one model here:
the seed of a record is that of the training, so that all edits of a photograph are one sample of
the statistics. Intervals are over photographs; how far the trainings are apart stands beside them.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from ipx2p.eval.intervals import LEAST, Difference, Estimate
from ipx2p.eval.lines import Line, make_lines, rounded, sortable
from ipx2p.eval.plots import Series, draw_panels
from ipx2p.eval.records import BUILT_IN, ORACLE, VAE_ROW, Record, key_of
from ipx2p.eval.scores import METRICS
from ipx2p.eval.tables import ENDS, TALLY, Cell, Table, cell
from ipx2p.files import csv_text

NO_EFFECT = "no effect shown: the interval contains 0"
HOW_TO_READ = (
    "Means over photographs and trainings, with 95 % intervals over photographs. Spread: standard "
    "deviation over trainings (seeds) of the mean. Difference: from {}, on the same photographs, "
    "with its 95 % interval, and cases won / tied / lost. The interval knows the spread over "
    "photographs; of that over trainings, so few seeds give only an impression."
)
PARTS = ("low", "high", *TALLY)


@dataclass(frozen=True)
class Answer:
    """A model or variant in one task, by one metric.

    at: its scales, if models were edited with several. pictures: the samples of the interval.
    seeds: of trainings; 0 for what was not trained here. spread: standard deviation over seeds of
    the mean over pictures; None if there are fewer than two. difference: paired, from the first
    variant. same_sign: in how many of the trainings it has the sign that it has on average.
    """

    task: str
    model: str
    at: str
    metric: str
    pictures: int
    mean: Estimate
    seeds: int = 0
    spread: float | None = None
    difference: Difference | None = None
    same_sign: int = 0

    @property
    def in_words(self) -> str:
        """What can be said of the difference; empty without one."""
        one, better = self.difference, METRICS[self.metric].better
        if one is None:
            return ""
        if one.low is None:
            return f"no interval: that needs {LEAST} photographs"
        if one.low <= 0 <= one.high:
            return NO_EFFECT
        verdict = "better" if one.mean * better > 0 else "worse"
        often = f", but in {self.same_sign} of {self.seeds} trainings only"
        return verdict + often * (self.same_sign < self.seeds)


def summary(records: Sequence[Record], baseline: str | None) -> str:
    """A table of the means of each task by the main metric, as text, and differences below it.

    Args:
        baseline: the model that others are compared with; None, or one with several settings: none.
    """
    rows = {record.row for record in records if record.model == baseline}
    lines = make_lines(records, baseline if len(rows) == 1 else None)
    metric = _metrics_of(records)[0]
    title = METRICS[metric].label
    by_task = {task: _lines_of(task, records, lines) for task in _tasks_of(records)}
    heads = sorted({(_place(ln.model, ()), ln.label) for some in by_task.values() for ln in some})
    width = max(len(title), *map(len, by_task)) + 1
    texts = [f"{title:<{width}}{'pictures':>10}"]
    texts += [f"{task:<{width}}{some[0].pictures:>10}" for task, some in by_task.items()]
    for _, head in heads:
        means = [
            next((line.scores.get(metric) for line in some if line.label == head), None)
            for some in by_task.values()
        ]
        for number, text in enumerate([head, *(cell(metric, mean).text for mean in means)]):
            texts[number] += f"{text:>{max(10, len(head) + 2)}}"
    for task, some in by_task.items():
        for line in some:
            one = line.against.get(baseline, {}).get(metric)
            if one is not None and not line.is_built_in:
                shown = cell(metric, one)
                beside = " ".join(shown.beside.split())
                texts.append(f"{task}: {line.label} minus {baseline} {shown.text} {beside}")
    if len(texts) > len(by_task) + 1:
        texts.append("(95 % intervals from 5 pictures on; cases won / tied / lost)")
    return "\n".join(texts)


def as_variant(records: Iterable[Record], variant: str, model: str, seed: int) -> list[Record]:
    """Records of the training of a variant with one seed, called by their variant.

    Args:
        model: its name in the records; those of other models but the built-in ones are left out.
        seed: of the training. Several seeds of an edit stay apart.
    """
    mine = [record for record in records if record.model in (model, *BUILT_IN)]
    seeds = sorted({record.seed for record in mine if record.model == model})
    made = {"weights": variant, "weights_digest": key_of(variant)}  # of many files, one row
    return [
        record
        if record.model in BUILT_IN
        else replace(
            record,
            model=variant,
            seed=seed * len(seeds) + seeds.index(record.seed),
            made_with=record.made_with | made,
        )
        for record in mine
    ]


def as_untrained(records: Iterable[Record]) -> list[Record]:
    """Records of models that stand beside: none of their seeds is that of a training."""
    records = [*records]
    seeds = {record.seed for record in records if record.model not in BUILT_IN}
    return [
        record
        if record.model in BUILT_IN
        else replace(record, seed=None if len(seeds) == 1 else -1 - record.seed)
        for record in records
    ]


def answers(records: Sequence[Record], variants: Sequence[str], per_training: int) -> list[Answer]:
    """Each model and variant in each task, by each metric that chooses.

    Args:
        records: see `as_variant`, `as_untrained`. variants: the first is the one that the others
            are compared with. per_training: how many seeds of edits each training has.
    """
    groups = _by_scales(records)
    lines = {at: make_lines(mine, variants[0]) for at, mine in groups.items()}
    found, main = [], next(iter(groups))
    for metric in _metrics_of(records):
        for task in _tasks_of(records):
            for at, mine in groups.items():
                some = _lines_of(task, mine, lines[at])
                some = [line for line in some if not line.is_built_in or at == main]
                of_task = [record for record in mine if record.case["task"] == task]
                first = next((line.label for line in some if line.model == variants[0]), "")
                means = _by_training(of_task, metric, per_training)
                for line in sorted(some, key=lambda line: _place(line.model, variants)):
                    if metric in line.scores:
                        one = _answer(line, first, task, at, metric)
                        is_trained = line.model in variants
                        found.append(_of_trainings(one, means, variants[0]) if is_trained else one)
    return found


def _answer(line: Line, first: str, task: str, at: str, metric: str) -> Answer:
    """Without what is known of trainings. first: label of the line that others differ from."""
    mean, about = line.scores[metric], (task, line.model, "" if line.is_built_in else at)
    difference = None if line.is_built_in else line.against.get(first, {}).get(metric)
    return Answer(*about, metric, line.pictures, mean, difference=difference)


Means = Mapping[tuple[str, int], Mapping[str, float]]


def _by_training(records: Iterable[Record], metric: str, per_training: int) -> Means:
    """Of each model and training the score of each case, the mean over its seeds."""
    scores: dict[tuple[str, int], dict[str, list[float]]] = {}
    for record in records:
        if record.seed is not None and record.picture is not None and metric in record.scores:
            training = record.model, record.seed // per_training
            cases = scores.setdefault(training, {})
            cases.setdefault(record.case["name"], []).append(record.scores[metric])
    return {
        training: {name: fmean(values) for name, values in cases.items()}
        for training, cases in scores.items()
    }


def _of_trainings(one: Answer, means: Means, first: str) -> Answer:
    """With spread, number of trainings, and in how many the difference has its sign."""
    mine = {seed: cases for (model, seed), cases in means.items() if model == one.model}
    by_seed = [fmean(cases.values()) for cases in mine.values()]
    spread = stdev(by_seed) if len(by_seed) > 1 and all(map(math.isfinite, by_seed)) else None
    same = 0
    for seed, cases in mine.items() if one.difference else ():
        reference = means.get((first, seed), {})
        pairs = [score - reference[name] for name, score in cases.items() if name in reference]
        same += bool(pairs) and fmean(pairs) * one.difference.mean > 0
    return replace(one, seeds=len(mine), spread=spread, same_sign=same)


def tables_of_answers(found: Sequence[Answer], variants: Sequence[str]) -> list[Table]:
    """A table for each metric."""
    tables = []
    with_scales = ["scales"] * any(one.at for one in found)
    for metric in dict.fromkeys(one.metric for one in found):
        label, digits = METRICS[metric].label, METRICS[metric].digits
        heads = ["task", "model", *with_scales, "photographs", "trainings", label, "spread"]
        rows = []
        for one in (one for one in found if one.metric == metric):
            spread = "" if one.spread is None else rounded(one.spread, digits)
            about = [one.task, one.model, *([one.at] if with_scales else [])]
            about += [str(one.pictures), str(one.seeds or "")]
            rows.append(
                [*(Cell(text, text) for text in about), cell(metric, one.mean)]
                + [Cell(spread, spread), cell(metric, one.difference), Cell(one.in_words)]
            )
        words = [HOW_TO_READ.format(variants[0])] if not tables else []
        tables.append(Table(label, words, [*heads, f"minus {variants[0]}", "in words"], rows))
    return tables


def csv_of_answers(found: Sequence[Answer]) -> str:
    """For programs, with all digits."""
    columns = ["metric", "task", "model", "scales", "photographs", "trainings", "mean"]
    columns += [*(f"mean_{end}" for end in ENDS), "spread", "difference"]
    columns += [*(f"difference_{part}" for part in PARTS), "same_sign", "in_words"]
    rows = []
    for one in found:
        row = {"metric": one.metric, "task": one.task, "model": one.model, "scales": one.at}
        row |= {"photographs": one.pictures, "trainings": one.seeds, "mean": one.mean.mean}
        row |= {f"mean_{end}": getattr(one.mean, end) for end in ENDS}
        row |= {"spread": one.spread, "in_words": one.in_words or None}
        if one.difference is not None:
            row |= {"difference": one.difference.mean, "same_sign": one.same_sign}
            row |= {f"difference_{part}": getattr(one.difference, part) for part in PARTS}
        rows.append(row)
    return csv_text(columns, rows)


def curve_of_answers(found: Sequence[Answer], variants: Sequence[str], axis: str) -> bytes | None:
    """The main metric against the variants, with a panel for each task, if they are numbers.

    Other models are drawn as flat lines; inputs and ceilings, which are far away, are left out.
    Needs matplotlib.
    """
    places = {name: re.match(r"\d+(\.\d+)?", name) for name in variants}
    if len(variants) < 2 or None in places.values():
        return None
    at = {name: float(match[0]) for name, match in places.items()}
    metric = found[0].metric
    panels: dict[str, dict[str, list]] = {}
    for one in (one for one in found if one.metric == metric and one.model not in BUILT_IN):
        series = panels.setdefault(one.task, {})
        if one.model in at:
            series.setdefault(one.at or "variants", []).append((at[one.model], one.mean))
        else:
            ends = (min(at.values()), max(at.values()))
            series[f"{one.model} {one.at}".strip()] = [(x, Estimate(one.mean.mean)) for x in ends]
    drawn = {
        task: [Series(label, sorted(points, key=lambda point: point[0])) for label, points in some]
        for task, some in ((task, series.items()) for task, series in panels.items())
    }
    return draw_panels(drawn, axis, METRICS[metric].label, same_y=False)


def _metrics_of(records: Iterable[Record]) -> list[str]:
    """Those that choose, the main one first."""
    there = {name for record in records for name in record.scores}
    return [name for name, metric in METRICS.items() if metric.chooses and name in there]


def _tasks_of(records: Iterable[Record]) -> list[str]:
    return sorted({record.case["task"] for record in records})


def _lines_of(task: str, records: Iterable[Record], lines: Sequence[Line]) -> list[Line]:
    """Those of a task, but the target; lines of one task alone are called by none."""
    named = task if len(_tasks_of(records)) > 1 else ""
    return [line for line in lines if line.task == named and line.model != ORACLE]


def _by_scales(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by scales, if a model has several settings; built-in rows are in all of them."""
    edits = [record for record in records if record.model not in BUILT_IN]
    models = {record.model for record in edits}
    if len({(record.model, record.row) for record in edits}) == len(models):
        return {"": [*records]}

    def scales(record: Record) -> str:
        both = (record.settings["guidance_scale"], record.settings["image_guidance_scale"])
        return "scales " + " and ".join("none" if one is None else f"{one:g}" for one in both)

    found: dict[str, list[Record]] = {}
    for record in sorted(edits, key=lambda record: sortable(record.settings["guidance_scale"])):
        found.setdefault(scales(record), []).append(record)
    built_in = [record for record in records if record.model in BUILT_IN]
    return {at: [*built_in, *mine] for at, mine in found.items()}


def _place(model: str, variants: Sequence[str]) -> tuple[int, int]:
    """Input, baselines, other models, variants in their order, and the ceiling."""
    if model in BUILT_IN:
        return (5 if model == VAE_ROW else 0), BUILT_IN.index(model)
    return (2, variants.index(model)) if model in variants else (1, 0)
