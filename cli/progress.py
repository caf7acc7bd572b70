"""Progress of long work on stderr: one live line on a terminal, else a plain line now and then."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from pathsegdiff.segmentation.loop import TrainProgress

#: Seconds between two plain lines where stderr is no terminal.
_PLAIN_INTERVAL = 15.0
_LIVE_INTERVAL = 0.2


class Progress:
    """Counts of one long loop with rate and time left; use it as a context manager.

    Calling it with (done, total, note) shows the state; ``unit`` names what is counted.
    """

    def __init__(self, label: str, unit: str, *, quiet: bool = False) -> None:
        self._label = label
        self._unit = unit
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._begin = self._first = 0.0
        self._started = False
        self._shown = 0.0
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._width:
            click.echo(err=True)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show the state if enough time has passed since the last time, or all is done."""
        if self._quiet:
            return
        now = time.monotonic()
        if not self._started:
            # What was done before, and how long the first took to come, says nothing of the rate.
            self._started, self._begin, self._first = True, now, done
        interval = _LIVE_INTERVAL if self._live else _PLAIN_INTERVAL
        if done < total and now - self._shown < interval:
            return
        self._shown = now
        line = self._line(done, total, now - self._begin, note)
        if self._live:
            click.echo(f"\r{line.ljust(self._width)}", nl=False, err=True)
            self._width = len(line)
        else:
            click.echo(line, err=True)

    def _line(self, done: int, total: int, seconds: float, note: str) -> str:
        rate = (done - self._first) / max(seconds, 1e-9)
        left = (total - done) / rate if rate > 0 else float("inf")
        parts = [f"{self._label}: {done}/{total} {self._unit}"]
        if rate > 0:
            parts.append(f"{rate:.3g} {self._unit}/s")
        if done < total:
            parts.append(f"{duration(left)} left")
        return ", ".join([*parts, *([note] if note else [])])


class TrainingProgress(Progress):
    """Progress of a training: steps, loss, and the latest validation."""

    def __init__(self, label: str = "train-head", *, quiet: bool = False) -> None:
        super().__init__(label, "steps", quiet=quiet)
        self._validated = ""

    def show(self, state: "TrainProgress") -> None:
        """Called after each step."""
        if state.row is not None and "val_miou" in state.row:
            self._validated = f", validation mIoU {state.row['val_miou']:.4f}"
        note = f"epoch {state.epoch}, loss {state.loss:.4f}{self._validated}"
        self(state.step, state.total_steps, note)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 05 s, 7 h 12 min."""
    if seconds == float("inf"):
        return "unknown time"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(count: float) -> str:
    """Bytes as people say them: 812 B, 3.4 MB, 1.2 TB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
