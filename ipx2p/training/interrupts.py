"""Being asked to stop: a signal ends a run after the step that is under way (layer 4)."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from ipx2p.distributed import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop while it did something that can be left and done again."""


class Interrupts:
    """Whether a run has been asked to stop; all its processes agree on the step after which."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.requested = False  # of this process
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._agreement: dist.Work | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGUSR1 as a request; the second one ends the process.

        One of several processes takes none any more afterwards: the signal that stopped the others
        may reach it late, when it has stopped with them.
        """
        earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler if self.world.size == 1 else signal.SIG_IGN)

    def agreed(self) -> bool:
        """Whether to stop now: the same answer on all processes, which all must ask.

        With several processes it is the answer to the previous question, so that the messages
        travel while the step runs and no process waits for another.
        """
        if self.world.size == 1:
            return self.requested
        stop = self._agreement is not None and self._settled()
        self._flag = torch.tensor([self.requested], dtype=torch.int32)
        self._agreement = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return stop

    def check(self) -> None:
        """Raise `Stopped` on all processes if any was asked to stop: for work that can be done
        again. All of them must call it equally often, and wait for one another."""
        if self.world.any(self.requested):
            raise Stopped

    def settle(self) -> None:
        """Wait for the last question's answer, before the processes part."""
        if self._agreement is not None:
            self._settled()

    def _settled(self) -> bool:
        self._agreement.wait()
        self._agreement = None
        return bool(self._flag.item())

    def _note(self, number: int, frame: object) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        with suppress(RuntimeError):  # it came in the middle of another print
            self.world.print(f"{signal.Signals(number).name}: stopping after this step")
