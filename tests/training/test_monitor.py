"""The log of a run: rows for all steps, and what a damaged file or a full disk costs."""

import json
import resource

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ipx2p.training.monitor
from ipx2p.distributed import World
from ipx2p.training.config import StepsConfig
from ipx2p.training.learner import Losses
from ipx2p.training.monitor import Monitor, _append


@pytest.fixture
def make_monitor(tmp_path):
    def make(log_every=1, steps_done=0):
        config = StepsConfig(steps=99, batch_size=2, log_every=log_every)
        return Monitor(
            tmp_path, config, World(), torch.device("cpu"),
            steps_done=steps_done, bad_steps=0, flops_per_sample=None,
        )  # fmt: skip

    return make


def take_steps(monitor, first, last):
    for step in range(first, last + 1):
        losses = torch.full((2,), float(step))
        monitor.step(step, [Losses(losses, losses)], 1e-3, torch.ones(()), torch.zeros(()))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_steps_before_a_stop_get_a_row_that_says_how_many_they_are(make_monitor, tmp_path):
    monitor = make_monitor(log_every=4)
    take_steps(monitor, 1, 6)
    for _ in range(2):  # the second time there is nothing left
        monitor.log()
    monitor.close()
    found = [(row["step"], row["num_steps"], row["loss"]) for row in rows(tmp_path)]
    assert found == [(4, 4, 2.5), (6, 2, 5.5)]


def test_lines_that_cannot_be_read_are_set_aside(make_monitor, tmp_path, capsys):
    good, late = b'{"step": 1, "loss": 2.0}\n', b'{"step": 3}\n'
    bad = b'\xff\xfe{"step": 1}\n7\n{"step": "1"}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(good + bad + late + b'{"step": 1, "los')  # a kill cut the last one short
    make_monitor(steps_done=2)
    assert path.read_bytes() == good
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == bad
    assert "set aside 3 unreadable lines in " in capsys.readouterr().out


def test_a_row_that_could_not_be_written_leaves_the_earlier_curve(
    make_monitor, tmp_path, monkeypatch
):
    monitor = make_monitor()
    take_steps(monitor, 1, 2)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(ipx2p.training.monitor, "_append", full)
        take_steps(monitor, 3, 3)
    take_steps(monitor, 4, 4)
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 4]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4]


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _append(path, "{}\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (6, limits[1])
    )  # a few bytes more, as a full disk has
    try:
        with pytest.raises(OSError, match="too large"):
            _append(path, '{"step": 2}\n')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "{}\n"
