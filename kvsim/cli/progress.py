"""A progress bar on standard error, for what takes longer than a moment, and only on a terminal."""

from __future__ import annotations

import sys
import time


class ProgressBar:
    """Entered, it gives a function of how many are done and how many there are, or None when there is no bar."""

    def __init__(self, of_what: str, *, hidden: bool):
        self.of_what = of_what
        self.hidden = hidden or not sys.stderr.isatty()
        self.started = time.monotonic()
        self.bar = self.task = None

    def __enter__(self):
        return None if self.hidden else self.update

    def update(self, done: int, total: int) -> None:
        if self.bar is None:
            if time.monotonic() - self.started < 0.5:
                return
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(self.of_what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.of_what, total=total)
        self.bar.update(self.task, completed=done)

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()
