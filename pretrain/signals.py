"""The wish of a user or a cluster that the run should end."""

from __future__ import annotations

import signal


class Stop:
    """Set by SIGTERM or SIGINT; the ranks agree at the end of each step, so that all stop after the same one."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def over(self) -> None:
        """Everything is written: from now on there is nothing to stop.

        Python's own end puts the system's handlers back, and a signal in that second would make a run that has done all
        it was asked look like one that was killed.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def _ask(self, number: int, frame: object) -> None:
        del number, frame
        self.asked = True
