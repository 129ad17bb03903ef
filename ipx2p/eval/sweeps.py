"""What lines of the table differ in: the names of series, and sweeps of one knob (layer 4).

A knob is any number among the settings of a line, or among the parameters of its guidance.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ipx2p.eval.lines import EFFECTIVE, TOLD_OF_MADE, Line
from ipx2p.eval.records import MADE

SCHEME = ("guidance", "sampler", "spacing")  # what `Line.scheme` ends with
Numbered = tuple[dict[str, float], Line]  # a line and its knobs


class Sweep(NamedTuple):
    """At least two lines that differ in one knob, in the order of its values; or a lone line.

    of: what tells these lines from those of other families, "" if there are none. knob: "" of a
    lone line, which has no values. through: where all sweeps of its family meet, in words.
    """

    of: str
    knob: str
    values: list[float]
    lines: list[Line]
    through: str


def series_of(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each model and scheme, by what differs; by the scheme if nothing does."""
    parts = {
        line.scheme: _made(line) | dict(zip(SCHEME, line.scheme[2:], strict=True)) for line in lines
    }
    told = dict(zip(parts, _differing([*parts.values()]), strict=True))
    series: dict[str, list[Line]] = {}
    for line in lines:
        label = told[line.scheme] or parts[line.scheme].get("guidance") or line.model
        series.setdefault(label, []).append(line)
    return series


def sweeps_of(lines: Sequence[Line]) -> list[Sweep]:
    """A sweep of every knob that has several values, for each family of lines; else its lone line.

    Lines of a family have the same words, and so the same knobs. All of its sweeps meet in one
    line: that which most others differ from in one knob alone; of several such lines, the one in
    the middle of all values.
    """
    families: dict[tuple, list[Numbered]] = {}
    words: dict[tuple, dict[str, str]] = {}
    for line in lines:
        own, numbers = knobs_of(line)
        family = (*own.items(), *numbers)
        words[family] = own
        families.setdefault(family, []).append((numbers, line))
    sweeps = []
    for told, family in zip(_differing([*words.values()]), families.values(), strict=True):
        middle, found = _through_middle(family)
        if len(family) == 1:
            sweeps.append(Sweep(told, "", [], [family[0][1]], ""))
        through = ", ".join(f"{knob} {middle[knob]:g}" for knob in found)
        for knob, mine in found.items():
            values = [numbers[knob] for numbers, _ in mine]
            sweeps.append(Sweep(told, knob, values, [line for _, line in mine], through))
    return sweeps


def knobs_of(line: Line) -> tuple[dict[str, str], dict[str, float]]:
    """What its settings, and the parameters in them, say in words, and in numbers; by name.

    `ip2p+rescale:phi=0.7` is the words `guidance` `ip2p+rescale` and the number `rescale phi` 0.7.
    """
    words, numbers = _made(line), {}
    for name, value in (line.settings or {}).items():
        if name in EFFECTIVE or f"{name}_in_full" in line.settings or value is None:
            continue
        name = name.removesuffix("_in_full").replace("_", " ")
        if isinstance(value, (int, float)):
            numbers[name] = float(value)
            continue
        parts = [part.partition(":") for part in str(value).split("+")]
        words[name] = "+".join(part for part, _, _ in parts)
        for part, _, parameters in parts:
            for parameter in filter(None, parameters.split(",")):
                key, _, text = parameter.partition("=")
                key = f"{part} {key}"
                key = f"{name} {key}" if key in words or key in numbers else key
                try:
                    numbers[key] = float(text)
                except ValueError:
                    words[key] = text
    return words, numbers


def _through_middle(lines: Sequence[Numbered]) -> tuple[dict[str, float], dict[str, list]]:
    """The knobs of the line where sweeps meet, and the lines of the sweep of each knob."""
    values = {knob: sorted({numbers[knob] for numbers, _ in lines}) for knob in lines[0][0]}

    def sweeps(middle: dict[str, float]) -> dict[str, list[Numbered]]:
        found = {}
        for knob in values:
            mine = [one for one in lines if one[0] | {knob: middle[knob]} == middle]
            if len({numbers[knob] for numbers, _ in mine}) > 1:
                found[knob] = sorted(mine, key=lambda one: one[0][knob])
        return found

    def fitness(middle: dict[str, float]) -> tuple[int, float]:
        off = (
            abs(2 * some.index(middle[k]) + 1 - len(some)) / len(some) for k, some in values.items()
        )
        return sum(map(len, sweeps(middle).values())), -sum(off)

    middle = max((numbers for numbers, _ in lines), key=fitness)
    return middle, sweeps(middle)


def _made(line: Line) -> dict[str, str]:
    """Its model, and how its edits were made, by name."""
    made = zip(MADE, TOLD_OF_MADE, line.made, strict=True)
    return {"model": line.model} | {name: told.format(one) for name, told, one in made if one}


def _differing(parts: Sequence[dict[str, str]]) -> list[str]:
    """What of each differs among them, in one text."""
    names = dict.fromkeys(name for own in parts for name in own)
    names = [name for name in names if len({own.get(name) or "" for own in parts} - {""}) > 1]
    return [", ".join(filter(None, (own.get(name) for name in names))) for own in parts]
