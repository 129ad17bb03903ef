"""Requests to stop: a signal ends a run after the current step (layer 4)."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from ipx2p.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# torchrun forwards its own SIGTERM, so one that is sent to the whole job arrives twice.
REPEAT_S = 5.0


class Stopped(Exception):
    """The run was asked to stop during work that can be abandoned and repeated."""


class Interrupts:
    """Whether a run has been asked to stop; all processes agree on the step after which."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.requested = False  # of this process
        self.stopped = False  # on all processes
        self._first: tuple[int, float] = (0, 0.0)  # the signal, and when it arrived
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._agreement: dist.Work | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGUSR1 as a request to stop; a second one ends the process.

        The same signal again within `REPEAT_S` counts as one. Once several processes have stopped,
        signals are ignored: one that stopped the others may arrive after this process has stopped.
        """
        earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                is_over = self.stopped and self.world.size > 1
                signal.signal(number, signal.SIG_IGN if is_over else handler)

    def agreed(self) -> bool:
        """Whether to stop now: the same answer on all processes, which must all ask.

        With several processes this is the answer to the previous question, so that the messages
        travel while the step runs and no process waits for another.
        """
        if self.world.size == 1:
            return self.requested
        stop = self.settle()
        self._flag = torch.tensor([self.requested], dtype=torch.int32)
        self._agreement = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return stop

    def check(self) -> None:
        """Raise `Stopped` on all processes if any was asked to stop: for work that can be
        repeated. All processes must call it equally often; they wait for one another."""
        if self.world.any(self.requested):
            self.stopped = True
            raise Stopped

    def settle(self) -> bool:
        """Wait for the answer to the last question; no process may exit before it."""
        if self._agreement is None:
            return False
        self._agreement.wait()
        self._agreement = None
        self.stopped |= bool(self._flag.item())
        return self.stopped

    def _note(self, number: int, frame: object) -> None:
        first, since = self._first
        if number == first and time.monotonic() - since < REPEAT_S:
            return
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested, self._first = True, (number, time.monotonic())
        with suppress(RuntimeError):  # it interrupted another print
            self.world.print(f"{signal.Signals(number).name}: stopping after this step")
