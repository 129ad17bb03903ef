"""The benchmark's harness: ways to do a piece of work take turns, and are compared (layer 5).

A machine is shared and its speed drifts, so every way is measured in every turn, each second turn
in reverse order, and what is reported is the median of ratios within turns.
"""

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import profile

from ipx2p import __version__
from ipx2p.devices import device_name, dtype_name, memory_bytes
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.files import atomic_write
from ipx2p.training.speed import known_peaks, peak_flops

PACKAGES = ("torch", "transformers", "Pillow", "diffusers")
TABLE_START, TABLE_END = "<!-- bench table -->\n", "<!-- end of bench table -->"
COLUMNS = "| Way | seconds | per second | of peak | GiB | time ratio | CPU ratio | memory ratio |"


class Way(NamedTuple):
    """One way to do the work.

    run: the measured call; it returns its peak memory in bytes if it ran in another process.
    start: called before it in every turn, not measured.
    """

    run: Callable[[], int | None]
    start: Callable[[], object] = lambda: None


@dataclass
class Work:
    """What is measured: a call of each way does the same.

    name, about: of the work, and what a call does. amount, unit: how much of what. flops: of a
    call; 0 where they are not counted.
    """

    name: str
    about: str
    amount: float
    unit: str
    ways: Mapping[str, Way]
    device: torch.device
    dtype: torch.dtype = torch.float32
    flops: float = 0.0


class Turn(NamedTuple):
    """One call: seconds on the clock, CPU seconds over all cores, peak memory in GiB."""

    seconds: float
    cpu_s: float
    gib: float


def measure(
    work: Work, *, turns: int, command: str, world: World | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Let the ways take turns; print every turn, then the table.

    Args:
        command: as it was typed. folder: for a trace of each way, after the turns.
    Returns: the record: what was measured, where, and a row for each way.
    """
    world = world or World()
    record = {"work": work.name, "about": work.about, "command": command} | machine(work)
    world.print("\n".join(f"{key}: {value}" for key, value in record.items()))
    done: dict[str, list[Turn]] = {name: [] for name in work.ways}
    peaks = []
    for index in range(turns):
        for name in [*work.ways][:: -1 if index % 2 else 1]:
            turn = _turn(work.ways[name], work.device)
            done[name].append(turn)
            world.print(
                f"turn {1 + index} of {turns}: {name}: {turn.seconds:.4g} s, cpu {turn.cpu_s:.4g} s"
            )
        if work.flops:
            peaks.append(world.size * peak_flops(work.device, work.dtype))
    if peaks:
        source = "data sheet" if known_peaks(device_name(work.device)) else "measured"
        record["peak"] = f"{median(peaks) / 1e12:.3g} TFLOP/s ({source})"
    record |= {"unit": work.unit, "turns": turns, "rows": rows(work, done, peaks)}
    world.print("\n".join(table([record])))
    for name, way in work.ways.items() if folder else ():
        way.start()
        with profile(record_shapes=True) as trace:
            way.run()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{work.name}-{name.replace(' ', '_')}.json"
        trace.export_chrome_trace(str(path))
        kind = "cuda" if work.device.type == "cuda" else "cpu"
        operators = trace.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=15)
        world.print(f"{name}, traced in {path}\n{operators}")
    return record


def rows(work: Work, done: Mapping[str, Sequence[Turn]], peaks: Sequence[float]) -> dict[str, dict]:
    """A row for each way; ratios are those of the first way to it, within turns."""
    first, *_ = done.values()
    found = {}
    for name, turns in done.items():
        seconds = [turn.seconds for turn in turns]
        row = {
            "seconds": _spread(seconds),
            "per_second": work.amount / median(seconds),
            "cpu_seconds": median(turn.cpu_s for turn in turns),
            "gib": median(turn.gib for turn in turns),
        }
        if work.flops:
            row["of_peak"] = work.flops / median(seconds) / median(peaks)
        if turns is not first:
            pairs = [*zip(first, turns, strict=True)]
            row["time_ratio"] = _spread([one.seconds / other.seconds for one, other in pairs])
            row["cpu_ratio"] = _spread([one.cpu_s / max(other.cpu_s, 1e-6) for one, other in pairs])
            row["memory_ratio"] = median(one.gib / other.gib for one, other in pairs)
        found[name] = row
    return found


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Records as Markdown, with a row for each way: medians, and in brackets the lowest and the
    highest of the turns. A ratio below 1: the first way takes less than this one."""
    lines = []
    for record in records:
        lines += [
            f"**{record['work']}**: {record['about']}; {record['dtype']}, {record['device']}, "
            f"{record['threads']} threads, {record['turns']} turns",
            "",
            f"`{record['command']}`",
            "",
            COLUMNS,
            "|" + "---|" * COLUMNS.count(" |"),
        ]
        for name, row in record["rows"].items():
            cells = [
                name,
                "{:.3g} [{:.3g}, {:.3g}]".format(*row["seconds"]),
                f"{row['per_second']:.3g} {record['unit']}",
                f"{row['of_peak']:.0%}" if "of_peak" in row else "",
                f"{row['gib']:.2f}",
                *(
                    "{:.2f} [{:.2f}, {:.2f}]".format(*row[ratio]) if ratio in row else ""
                    for ratio in ("time_ratio", "cpu_ratio")
                ),
                f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        peak = [f"peak {record['peak']}"] if "peak" in record else []
        lines += ["", "; ".join([*peak, f"load {record['load']}", record["versions"]]), ""]
    return lines


def append(record: Mapping[str, Any], path: Path) -> None:
    """Add a record to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def write_table(path: Path, into: Path | None) -> None:
    """Print the latest record of each work as a table, or put it between the marks of a page.

    Raises: InputError for a file that holds no records, or a page without marks.
    """
    latest = {}
    try:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            latest[record["work"], record["about"], record["device"], record["dtype"]] = record
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no file of records of ipx2p.bench: {error!r}") from error
    lines = table([*latest.values()])
    if into is None:
        print("\n".join(lines))
        return
    before, start, rest = into.read_text().partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not (start and end):
        raise InputError(f"{into} has no lines {TABLE_START.strip()} and {TABLE_END}")
    page = before + start + "\n".join(["", *lines, "", ""]) + end + after
    with atomic_write(into) as temporary:
        temporary.write_text(page)


def machine(work: Work) -> dict[str, Any]:
    """What the work runs on, and with which versions."""
    found = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return {
        "device": device_name(work.device),
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(work.dtype),
        "load": round(os.getloadavg()[0], 1),
        "versions": f"ipx2p {__version__}, python {platform.python_version()}, {', '.join(found)}",
    }


def _turn(way: Way, device: torch.device) -> Turn:
    way.start()
    _reset_peak_memory(device)
    since, cpu_since = _clocks(device)
    elsewhere = way.run()
    until, cpu_until = _clocks(device)
    memory = memory_bytes(device) if elsewhere is None else elsewhere
    return Turn(until - since, cpu_until - cpu_since, memory / 2**30)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest, highest."""
    return median(values), min(values), max(values)


def _clocks(device: torch.device) -> tuple[float, float]:
    """Seconds on the clock, and CPU seconds of this process and of its children that have ended,
    once the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux; elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
