"""When to stop: a signal to one rank ends all of them at the same step, with everything saved.

Slurm warns with USR2 (as launch/slurm.yaml asks) and ends with TERM; torchrun and people send TERM or INT. The handlers set a flag; the loop
asks `StopFlag.agreed` once a step, on every rank.
"""

import signal
import sys
from types import FrameType

import torch
import torch.distributed as dist

from ssl_locat.runs import distributed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_remembered = 0  # a signal that came before there was a loop to stop


def remember_signals() -> None:
    """From here on a stop signal is kept for the next `StopFlag`; before that, it would end the process with nothing saved."""

    def keep(number: int, _frame: FrameType | None) -> None:
        global _remembered
        _remembered = _remembered or number

    for number in STOP_SIGNALS:
        signal.signal(number, keep)
    deliver_signals()


def deliver_signals() -> None:
    """Those that came while the process started were held back (cluster/launch.py blocks them): let them reach their handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class StopFlag:
    """A wish to stop (time limit, preemption, Ctrl-C) that all ranks follow at the same step.

    Handlers only set a flag: whatever the signal meets (a collective, a compile) is finished first. A second Ctrl-C ends the
    process at once. Use as a context manager around the loop; call `agreed()` once per step on every rank.
    """

    def __init__(self) -> None:
        self.signal = _remembered  # the first that arrived here; 0: none
        self._work: dist.Work | None = None
        self._vote = torch.zeros(2, dtype=torch.int64)
        self.wish = 0  # the largest of all ranks' at the last call of `agreed`
        # gloo passes a vote on in a ring, some 50 us a rank: on many ranks it gets several steps to arrive in
        self._every, self._calls = max(1, distributed.world_size() // 64), 0
        self._former: dict = {}
        self._own_wish = 0  # until it is voted for

    @property
    def requested(self) -> bool:
        return self.signal != 0

    @property
    def reason(self) -> str:
        """Name of the signal agreed on, such as 'SIGUSR2'; '' before that."""
        return signal.Signals(self.signal).name if self.signal else ""

    def __enter__(self) -> "StopFlag":
        self._former = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # where a rank is lost, torchrun's agent and Slurm end the others at once: what they have to say about it takes some seconds
        ignored = STOP_SIGNALS if error and distributed.cpu_group() is not None else ()
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_IGN if number in ignored and number != signal.SIGINT else handler or signal.SIG_DFL)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # 130 = 128 + SIGINT, as a shell reports it
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            sys.exit(130)
        self.signal = self.signal or number

    def agreed(self, wish: int = 0) -> bool:
        """True on all ranks at the same call once any rank was signalled; `.wish` is the largest `wish` of all ranks at a former call.

        The vote of this call is read at the next one (with more than 127 ranks, some calls later), by when it has long arrived: no
        step waits for it. If a rank is gone, the vote raises here: this is also the heartbeat.
        """
        if distributed.cpu_group() is None:
            self.wish = wish
            return self.requested
        self._calls, self.wish, self._own_wish = self._calls + 1, 0, max(self._own_wish, wish)
        if self._calls % self._every:
            return False
        if self._work is not None:
            self._work.wait()
            voted, self.wish = self._vote.tolist()
            if voted:
                self.signal, self._work = voted, None
                return True
        self._vote, self._own_wish = torch.tensor([self.signal, self._own_wish]), 0
        self._work = dist.all_reduce(self._vote, dist.ReduceOp.MAX, group=distributed.cpu_group(), async_op=True)
        return False
