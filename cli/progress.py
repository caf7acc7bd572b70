"""Progress of long work on stderr: one live line on a terminal, else a plain line now and then."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from pathsegdiff.fetch.download import State
    from pathsegdiff.segmentation.loop import TrainProgress

#: Seconds between two plain lines where stderr is no terminal.
_PLAIN_INTERVAL = 15.0
_LIVE_INTERVAL = 0.2


class Progress:
    """Counts of one long loop with rate and time left; use it as a context manager.

    Calling it with (done, total, note) shows the state; ``unit`` names what is counted, and
    "bytes" are shown as people say them. A total of None is not known.
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

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Show the state if enough time has passed since the last time, or all is done."""
        if self._quiet:
            return
        now = time.monotonic()
        if not self._started:
            # What was done before, and how long the first took to come, says nothing of the rate.
            self._started, self._begin, self._first = True, now, done
        interval = _LIVE_INTERVAL if self._live else _PLAIN_INTERVAL
        if (total is None or done < total) and now - self._shown < interval:
            return
        self._shown = now
        line = self._line(done, total, now - self._begin, note)
        if self._live:
            click.echo(f"\r{line.ljust(self._width)}", nl=False, err=True)
            self._width = len(line)
        else:
            click.echo(line, err=True)

    def _line(self, done: int, total: int | None, seconds: float, note: str) -> str:
        rate = (done - self._first) / max(seconds, 1e-9)
        parts = [f"{self._label}: {self._count(done, total)}"]
        if rate > 0:
            per_second = size(rate) if self._unit == "bytes" else f"{rate:.3g} {self._unit}"
            parts.append(f"{per_second}/s")
        if total is not None and done < total:
            left = (total - done) / rate if rate > 0 else float("inf")
            parts.append(f"{duration(left)} left")
        return ", ".join([*parts, *([note] if note else [])])

    def _count(self, done: int, total: int | None) -> str:
        if self._unit == "bytes":
            return size(done) if total is None else f"{size(done)} of {size(total)}"
        return f"{done} {self._unit}" if total is None else f"{done}/{total} {self._unit}"


class TransferProgress:
    """Progress of transfers, one after the other: a line of its own for each."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._label: str | None = None
        self._current: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._current is not None:
            self._current.__exit__(kind, error, traceback)

    def show(self, state: "State") -> None:
        """Called after each piece."""
        if self._current is None or state.label != self._label:
            if self._current is not None:
                self._current.__exit__(None, None, None)
            self._label = state.label
            self._current = Progress(state.label, state.unit, quiet=self._quiet)
        self._current(state.done, state.total, state.note)


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
