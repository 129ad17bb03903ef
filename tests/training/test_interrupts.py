"""Which signals end a run after its step, and which at once."""

import os
import signal

import pytest

import ipx2p.training.interrupts
from ipx2p.distributed import World
from ipx2p.training.interrupts import REPEAT_S, SIGNALS, Interrupts


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def interrupts(monkeypatch):
    """Interrupts whose clock the test sets, in `clock[0]`; the end of the process raises."""
    clock = [100.0]
    monkeypatch.setattr(ipx2p.training.interrupts.time, "monotonic", lambda: clock[0])
    interrupts = Interrupts(World())
    interrupts.clock = clock
    with interrupts.listen():
        kill = os.kill

        def end(*_):
            raise Ended

        monkeypatch.setattr(os, "kill", end)
        interrupts.send = lambda number: kill(os.getpid(), number)
        yield interrupts


def test_the_same_signal_again_within_seconds_is_one(interrupts):
    interrupts.send(signal.SIGTERM)
    interrupts.clock[0] += REPEAT_S - 0.1
    interrupts.send(signal.SIGTERM)  # torchrun's own
    assert interrupts.requested
    interrupts.clock[0] += 0.2
    with pytest.raises(Ended):
        interrupts.send(signal.SIGTERM)


def test_another_signal_ends_at_once(interrupts):
    interrupts.send(signal.SIGTERM)
    with pytest.raises(Ended):
        interrupts.send(signal.SIGINT)


@pytest.mark.parametrize("stopped", [False, True])
def test_only_processes_that_have_stopped_ignore_later_signals(stopped):
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    interrupts = Interrupts(World(0, 2))
    try:
        with interrupts.listen():
            interrupts.stopped = stopped
        for number, handler in earlier.items():
            assert signal.getsignal(number) == (signal.SIG_IGN if stopped else handler)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
