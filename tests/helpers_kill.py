"""Run ``psd`` and kill the process at one of the moments at which it changes the disk.

    python -m tests.helpers_kill AT ARGUMENTS...

The AT-th write, sync or rename (from 1) is not done, of a write only half, and SIGKILL follows;
with 0 all are done. Steps of a training count as well. The last line of stdout is JSON: how many
such moments there were, and how many steps of a training were begun.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Moments:
    """Counts what changes the disk."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.steps = at, 0, 0

    def passed(self, half: Callable[[], Any] = lambda: None) -> None:
        """One more; the last thing that is done is ``half``."""
        self.count += 1
        if self.count == self.at:
            half()
            self.tell()
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self) -> None:
        """Print what was counted."""
        print(json.dumps({"moments": self.count, "steps": self.steps}), flush=True)

    def watch(self, owner: Any, name: str) -> None:
        """Let a function of a module or class count before it runs."""
        real = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.passed()
            self.steps += name == "_train_step"
            return real(*arguments, **options)

        setattr(owner, name, counted)

    def watch_writes(self) -> None:
        """Let ``Path.write_bytes`` count, and be cut short."""
        real = Path.write_bytes

        def counted(path: Path, content: Any) -> int:
            self.passed(lambda: real(path, bytes(content)[: len(content) // 2]))
            return real(path, content)

        Path.write_bytes = counted  # type: ignore[method-assign]


def main() -> None:
    moments = Moments(int(sys.argv[1]))
    from zarr.storage import _local

    from cli.main import run
    from pathsegdiff.segmentation.loop import TrainingLoop

    if "pretrain" in sys.argv:
        from pathsegdiff.diffusion.pretrain import loop

        moments.watch(loop.TrainingLoop, "_train_step")
        real = loop.TrainingLoop.run

        def run_with_checkpoints(self: Any, **options: Any) -> bool:
            """One after every step: some are half-written when the end comes."""
            return real(self, **{**options, "checkpoint_seconds": 0.0})

        loop.TrainingLoop.run = run_with_checkpoints  # type: ignore[method-assign]
    moments.watch_writes()
    moments.watch(os, "fsync")
    moments.watch(Path, "replace")
    moments.watch(_local, "_put")
    moments.watch(TrainingLoop, "_train_step")
    sys.argv = ["psd", *sys.argv[2:]]
    code = run(sys.argv[1:])
    moments.tell()
    sys.exit(code)


if __name__ == "__main__":
    main()
