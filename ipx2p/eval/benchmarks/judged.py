"""Published benchmarks that a language model judges: requests out, answers in (layer 4).

Nothing is called here. Requests are lines of JSON {"id", "judge", "prompt", "pictures"}, with
pictures relative to the file; an answer is a line {"id", "answer"}, and "judge" where another
model gave it. Rubrics follow PKU-YuanGroup/ImgEdit Benchmark/Basic and, for GEdit-Bench,
TIGER-AI-Lab/VIEScore, in our words.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from ipx2p.data.published.parquet import Parquet
from ipx2p.data.published.source import sentence
from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.protocol import Protocol, entries, extract
from ipx2p.eval.cases import Case
from ipx2p.eval.intervals import Estimate, estimates
from ipx2p.eval.records import IDENTITY, Record, Records, read_folders
from ipx2p.files import atomic_write, hold_lock

_FORM = 'Answer with JSON only: {"score": [%s], "reasoning": "one sentence"}.'
_LIST = re.compile(r'"scores?"\s*:\s*\[([^\]]*)\]')
_LINES = re.compile(r":\s*(\d+(?:\.\d+)?)\s*$", re.MULTILINE)  # "Prompt Compliance: 4"


class Question(NamedTuple):
    """One request about an edit, which asks for `count` scores from low to high.

    metric: what `combine` makes of the scores. with_source: the source is shown too.
    """

    name: str
    metric: str
    combine: Callable[[list[float]], float]
    with_source: bool
    count: int
    low: int
    high: int
    text: str


QUESTIONS = {
    "imgedit": (
        Question(
            *("edit", "judged", fmean, True, 3, 1, 5),
            "The second picture is an edit of the first by the instruction: <edit_prompt>\n"
            "Give three whole numbers from 1, worst, to 5, best: how exactly the instruction was "
            "carried out; how clean and free of traces the edit is; how well all that the "
            "instruction leaves alone was kept, and how plausible it is. "
            + _FORM
            % "instruction, quality, preservation",
        ),
    ),
    "gedit": (
        Question(
            *("sc", "judged_sc", min, True, 2, 0, 10),
            "The second picture is an edit of the first by the instruction: <edit_prompt>\n"
            "Give two numbers from 0 to 10: how completely the instruction was carried out (0 not "
            "at all, 10 perfectly), and how little else was changed (0 another scene, 10 the "
            "smallest change that does it). The two may be the same picture, if the edit failed. "
            + _FORM
            % "success, little overediting",
        ),
        Question(
            *("pq", "judged_pq", min, False, 2, 0, 10),
            "A program made this picture. Give two numbers from 0 to 10: how natural it looks (0 "
            "wrong distances, shadows or light, 10 natural), and how free of faults it is (0 "
            "distortion, scratches, watermarks, blurred faces or unusual bodies all over, 10 "
            "none). " + _FORM % "naturalness, absence of faults",
        ),
    ),
}


def export_requests(records: Iterable[Record], path: Path, judge: str) -> None:
    """Write the questions about the edits of a judged benchmark.

    Args:
        records: of one benchmark; the identity records among them show the sources.
        path: of the file, JSONL. judge: whom the answers are wanted from.
    """
    records = [record for record in records if record.picture]
    sources = {record.case["name"]: record.path for record in records if record.model == IDENTITY}
    lines = []
    for record in records:
        for question in _questions(record):
            shown = [sources[record.case["name"]]] if question.with_source else []
            request = {
                "id": f"{record.key}/{question.name}",
                "judge": judge,
                "prompt": question.text.replace("<edit_prompt>", record.case["instruction"]),
                "pictures": [
                    Path(os.path.relpath(picture, path.parent)).as_posix()
                    for picture in (*shown, record.path)
                ],
            }
            lines.append(json.dumps(request) + "\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines))


def add_answers(path: Path, folder: Path) -> None:
    """Keep the scores of a judge's answers in the records of a folder; see `read_answers`."""
    asked = [record for record in read_folders([folder]) if record.case["benchmark"] in JUDGES]
    if not asked:
        raise InputError(f"{folder} has no edits of {', '.join(JUDGES)}: leave out --answers")
    answered = read_answers(path, asked, JUDGES[asked[0].case["benchmark"]])
    lock = hold_lock(folder / ".lock")
    if lock is None:
        raise InputError(f"another process is computing in {folder}: wait for it")
    with lock:
        records, now = Records(folder), round(time.time(), 3)
        for record in answered:
            records.add(replace(record, scored_at=now))


def read_answers(path: Path, records: Sequence[Record], judge: str) -> list[Record]:
    """The records with the scores of their answers, and nothing else among their scores.

    A record with an answer of null is left out.
    Raises: InputError for a line that is no answer, or a question without one.
    """
    given = _answers(path)
    asked = [
        (record, [(question, f"{record.key}/{question.name}") for question in _questions(record)])
        for record in records
        if record.picture
    ]
    names = [name for _, questions in asked for _, name in questions]
    if missing := [name for name in names if name not in given]:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(names)} answers, the first of them "
            f"{missing[0]}: ask again, or give null for one that was refused"
        )
    if unknown := given.keys() - {*names}:
        raise InputError(f"{path} answers {min(unknown)}, which no edit here is asked about")
    scored = []
    for record, questions in asked:
        answers = [(question, given[name]) for question, name in questions]
        if all(line["answer"] is not None for _, line in answers):
            scores = {one.metric: one.combine(_numbers(line, one)) for one, line in answers}
            scores.setdefault("judged", math.prod(scores.values()) ** (1 / len(scores)))
            by = str(answers[-1][1].get("judge", judge))
            scored.append(replace(record, scores=scores, scored_by=dict.fromkeys(scores, by)))
    return scored


def _answers(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by id, each with `where` it is."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    given: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{path} line {number}"
        try:
            line = json.loads(text)
            name, _ = line["id"], line["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f'{where} is not {{"id": ..., "answer": ...}}: {text:.80}') from error
        if name in given:
            raise InputError(f"{where} answers {name} a second time: keep one of the two")
        given[name] = line | {"where": where}
    return given


def _questions(record: Record) -> tuple[Question, ...]:
    """What is asked about an edit, by the first word of its benchmark's name."""
    return QUESTIONS[record.case["benchmark"].partition("-")[0]]


def _numbers(line: dict[str, Any], question: Question) -> list[float]:
    """The scores in an answer: a list in JSON, or lines that end in one, as ImgEdit's do."""
    answer = line["answer"]
    text = answer if isinstance(answer, str) else json.dumps(answer)
    listed = _LIST.findall(text)
    found = re.findall(r"-?\d+(?:\.\d+)?", listed[-1]) if listed else _LINES.findall(text)
    numbers = [float(number) for number in found]
    low, high = question.low, question.high
    if len(numbers) != question.count or not all(low <= number <= high for number in numbers):
        raise InputError(
            f"{line['where']} has the scores {numbers}, expected {question.count} from {low} to "
            f"{high}"
        )
    return numbers


def mean_over_tasks(records: Sequence[Record], names: Iterable[str]) -> dict[str, Estimate]:
    """The mean of the tasks' means by metric, with its interval, of the records of one line.

    Pictures are drawn within their task: the values are deviations from the mean of the task,
    weighted so that each task counts the same. Nothing without a record that has all of the names.
    """
    records = [record for record in records if {*names} <= {*record.scores}]
    if not records:
        return {}
    pictures = [record.case["group"] for record in records]
    _, pictures = np.unique(pictures, return_inverse=True)
    tasks, place = np.unique([record.case["task"] for record in records], return_inverse=True)
    counts = np.bincount(place)
    small = counts.min() < 2  # a task of one picture has no spread of its own
    found = {}
    for name in names:
        values = np.array([record.scores[name] for record in records])
        means = np.bincount(place, values) / counts
        weights = len(values) / (len(tasks) * np.sqrt(counts * np.maximum(counts - 1, 1)))
        even = means.mean() + weights[place] * (values - means[place])
        [found[name]] = estimates(even[None], pictures)
        if small:
            found[name] = Estimate(found[name].mean)
    return found


def read_imgedit(folder: Path, extracted: Path) -> list[Case]:
    """ImgEdit basic: basic_edit.json (or singleturn.json) with the pictures it names beside it, or
    in original_images, or in singleturn.
    """
    names = ("basic_edit.json", "singleturn.json")
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    roots = [folder, folder / "original_images", folder / "singleturn"]
    cases = []
    for key, item, where in entries(path):
        file, instruction, task = (
            sentence(item.get(name), f"{where} {name!r}") for name in ("id", "prompt", "edit_type")
        )
        picture = next((root / file for root in roots if (root / file).is_file()), None)
        if picture is None:
            raise InputError(
                f"{folder / file} is missing (also in original_images), {where} lists it"
            )
        cases.append(Case(key, picture, instruction, task, results=(f"{key}.png",)))
    return cases


class GEdit(Parquet):
    """data/train-00000-of-*.parquet with the columns task_type, key, instruction,
    instruction_language, input_image (stepfun-ai/GEdit-Bench).
    """

    name = "gedit"


def read_gedit(folder: Path, extracted: Path) -> list[Case]:
    """The English instructions of GEdit-Bench; the others are Chinese."""
    kinds = dict.fromkeys(("task_type", "key", "instruction", "instruction_language"), "sentence")
    cases = []
    for where, _, row in GEdit(folder, {}).rows("train", kinds | {"input_image": "picture"}):
        if row["instruction_language"] == "en":
            path = extract(row["input_image"], extracted, where)
            result = f"{row['task_type']}/en/{row['key']}.png"
            about = (row["key"], path, row["instruction"], row["task_type"])
            cases.append(Case(*about, results=(f"fullset/{result}", result)))
    if not cases:
        raise InputError(f"{folder} has no rows with instruction_language 'en'")
    return cases


_NOTE = (
    "The judge is part of the number: rows by another model, or another version of it, are another "
    "benchmark. Our prompts say in other words what the official ones ask."
)

JUDGED = (
    Protocol(
        "imgedit",
        "ImgEdit basic, judged 1 to 5: the mean of three scores, then of the edit types",
        read_imgedit,
        ("judged",),
        notes=(_NOTE, "The file's types alter and compose are called adjust and hybrid in tables."),
        judge="gpt-4o",
    ),
    Protocol(
        "gedit",
        "GEdit-Bench, English instructions, judged 0 to 10: SC, PQ and sqrt(SC PQ) of each edit, "
        "then the mean of the groups' means",
        read_gedit,
        ("judged_sc", "judged_pq", "judged"),
        notes=(_NOTE,),
        judge="gpt-4.1",
    ),
)
JUDGES = {protocol.name: protocol.judge for protocol in JUDGED}
