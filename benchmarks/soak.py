"""Ten thousand tiny samples through both stages: are memory, handles and speed the same at the end?

    python benchmarks/soak.py --samples 10000 --work DIR [--json FILE]

Makes small images of discs (with objects, so that each has an array of its own), a model of random
weights (preset micro), and runs `psd extract`, `psd cache verify`, one epoch of `psd train-head`
and `psd eval`, each in a process of its own, one tap of each level on regions of one patch. What
the bookkeeping of each sample costs is a good part of the time. While a command runs, its
resident memory, open handles and threads are looked at every second, on Linux (/proc).

Printed are, for each command: seconds; samples per second, and the processor's milliseconds per
sample, between 10 and 20 % of the samples and over the last tenth; memory at 10, 50 and 100 % of
the way and the largest; handles and threads at 20 % and the most after that. The way is counted in
what the command leaves (marks of samples), in steps of the training after its look at all features,
or, where a command leaves nothing for each sample, in bytes that it has read and written.

The exit code is 1 if a command grows: after the first fifth of its way by 50 MB or more, or by more
than 5 handles or threads. The table of samples is read before that.

When it is broken off, the same command goes on; a command that was in the middle is then watched
for the rest of its way only.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pathsegdiff.diffusion.bundle import init_bundle
from pathsegdiff.files import replace_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: (height, width) of a source image, and the side of a region: a patch, which is the smallest.
SOURCE_PX, REGION_PX = (48, 64), 256
#: One tap of each level: every kind of file that a sample has, and few bytes.
TAPS = "up_00,up_03,up_06,up_09"
#: A test part of a fifth; four images to a group.
TEST_EVERY, GROUP_SIZE = 5, 4
#: What a command may gain between this part of its way and its end.
FROM = 0.2
LIMIT_BYTES, LIMIT_HANDLES = 50_000_000, 5
SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """A process at one moment.

    Attributes:
        seconds: Since it began.
        cpu_seconds: Of the processor.
        done: Of its way.
        counted: Samples, steps or bytes; what its speed is measured in.
        rss_bytes: Resident memory.
        handles: Open files, sockets and pipes.
        threads: Of it.
    """

    seconds: float
    cpu_seconds: float
    done: float
    counted: float
    rss_bytes: int
    handles: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command that is watched.

    Attributes:
        name: In the table.
        arguments: Of psd.
        samples: That it goes over; ``counted`` ends there.
        way: What it has done, from its process's number and its latest "done/total".
        counts: The same for its speed.
    """

    name: str
    arguments: tuple[str, ...]
    samples: int
    way: "Measure"
    counts: "Measure"


#: (process, latest "done" that it has said) -> how far it is, in any unit.
Measure = Callable[[int, int], float]


def main() -> int:
    """Make the images, run the commands that have not finished yet, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--work", type=Path, required=True, help="folder to make or continue")
    parser.add_argument("--json", type=Path, help="every look at every command")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        found = soak(options.work, options.samples)
    except KeyboardInterrupt:
        print("broken off; the same command goes on", file=sys.stderr)
        return 130
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    print(f"files in the store: {found['files']:,}, {found['bytes'] / 1e6:,.0f} MB")
    problems = [problem for stage in found["stages"] for problem in growth(stage)]
    print("\n".join(problems) or "nothing grows")
    return 1 if problems else 0


def soak(work: Path, samples: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Every command on so many samples; what has finished in this folder is not run again.

    Args:
        work: Folder to make or continue.
        samples: At least 20; another number than before is an error.
        seconds: Between two looks.

    Returns:
        ``samples``, ``stages`` (name, samples, seconds and looks of each), ``files`` and ``bytes``
        of the store.
    """
    work.mkdir(parents=True, exist_ok=True)
    record = work / "soak.json"
    found: dict[str, Any] = {"samples": samples, "stages": []}
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["samples"] != samples:
            raise SystemExit(f"{work} holds a run of {found['samples']} samples; choose another")
    make_data(work / "data", samples)
    if not (work / "model").exists():
        init_bundle("micro", seed=0, out=work / "model")
    finished = {stage["name"] for stage in found["stages"]}
    for stage in stages(work, samples):
        if stage.name not in finished:
            print(f"psd {' '.join(stage.arguments)}", flush=True)
            looks = watch(stage, work, seconds)
            found["stages"].append(
                {
                    "name": stage.name,
                    "samples": stage.samples,
                    "seconds": looks[-1].seconds,
                    "looks": [asdict(look) for look in looks],
                }
            )
            text = json.dumps(found)
            replace_file(record, lambda file, text=text: file.write_text(text, "utf-8"))
    files = [file.stat().st_size for file in (work / "s.zarr").rglob("*") if file.is_file()]
    return {**found, "files": len(files), "bytes": sum(files)}


def make_data(folder: Path, samples: int) -> None:
    """Images and masks of discs, no two alike; their manifest is written last."""
    from tests.helpers_stage_one import discs_manifest, draw_discs

    if (folder / "soak.toml").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = ["sample_id,image,mask,split,group"]
    for number in range(samples):
        name = f"s{number:06d}"
        image, mask = draw_discs(np.random.default_rng(number), SOURCE_PX)
        Image.fromarray(image).save(folder / f"images/{name}.png", compress_level=1)
        Image.fromarray(mask).save(folder / f"images/{name}_mask.png", compress_level=1)
        group = number // GROUP_SIZE
        split = "test" if group % TEST_EVERY == 0 else "train"
        rows.append(f"{name},images/{name}.png,images/{name}_mask.png,{split},g{group}")
    (folder / "soak.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    manifest = discs_manifest("soak", region_px=REGION_PX)
    (folder / "soak.toml").write_text(manifest, encoding="utf-8")


def stages(work: Path, samples: int) -> list[Stage]:
    """The commands in their order."""
    groups = [number // GROUP_SIZE for number in range(samples)]
    test = sum(group % TEST_EVERY == 0 for group in groups)
    marks, masks = work / "s.zarr" / "marks", work / "run" / "eval-test" / "predictions"
    extract = ("extract", "--dataset", "data/soak.toml", "--model", "model", "--taps", TAPS)
    train = ("train-head", "--features", "s.zarr", "--epochs", "1", "--out", "run")
    return [
        Stage(
            name="extract",
            arguments=(*extract, "--out", "s.zarr"),
            samples=samples,
            way=files_in(marks),
            counts=files_in(marks),
        ),
        Stage(
            name="verify",
            arguments=("cache", "verify", "s.zarr"),
            samples=samples,
            way=bytes_moved,
            counts=bytes_moved,
        ),
        Stage(
            name="train-head",
            arguments=train,
            samples=samples - test,
            way=said,
            counts=said,
        ),
        Stage(
            name="eval",
            arguments=("eval", "--run", "run"),
            samples=test,
            way=bytes_moved,
            counts=files_in(masks),
        ),
    ]


def files_in(folder: Path) -> Measure:
    """Files of a folder: one for each finished sample."""

    def count(process: int, latest: int) -> float:
        try:
            return sum(entry.name[0] != "." for entry in os.scandir(folder))
        except FileNotFoundError:
            return 0

    return count


def bytes_moved(process: int, latest: int) -> float:
    """What a process has read and written."""
    values = fields(Path(f"/proc/{process}/io").read_text(encoding="ascii"))
    return values["rchar"] + values["wchar"]


def said(process: int, latest: int) -> float:
    """What a process says that it has done."""
    return latest


def watch(stage: Stage, work: Path, seconds: float) -> list[Look]:
    """Run a command, and look at it until it ends.

    Raises:
        SystemExit: If it fails; its output stands in ``work``.
    """
    # On a terminal it says several times a second how far it is, elsewhere every 15 s; a training
    # has no other trace of its steps.
    latest = [0]
    terminal, its_end = os.openpty()
    log = work / f"{stage.name}.log"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-m", "cli", *stage.arguments],
        cwd=work,
        env={**os.environ, "PYTHONPATH": path},
        stdout=its_end,
        stderr=its_end,
    ) as process:
        os.close(its_end)
        reader = threading.Thread(target=_listen, args=(terminal, log, latest))
        reader.start()
        begin = time.monotonic()
        looks: list[Look] = []
        try:
            while process.poll() is None:
                # Unless it has just ended.
                with contextlib.suppress(OSError, KeyError):
                    looks.append(_look(stage, process.pid, latest[0], time.monotonic() - begin))
                time.sleep(seconds)
        finally:
            if process.poll() is None:
                process.terminate()  # not Ctrl-C, which a shell may have taken from it
            process.wait()
            reader.join()
            os.close(terminal)
    if process.returncode:
        raise SystemExit(f"psd {stage.arguments[0]} ended with {process.returncode}: {log}")
    return scaled(looks, stage.samples)


def _listen(terminal: int, log: Path, latest: list[int]) -> None:
    """Log what a command says until nobody is left to say something."""
    with log.open("ab") as output:
        while content := _said_next(terminal):
            output.write(content)
            output.flush()
            for done in re.findall(rb": (\d+)/\d+ ", content):
                latest[0] = int(done)


def _said_next(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so where others give nothing
        return b""


def _look(stage: Stage, process: int, latest: int, seconds: float) -> Look:
    status = fields(Path(f"/proc/{process}/status").read_text(encoding="ascii"))
    # After the name, which may hold anything: user and system time are the 12th and 13th.
    times = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return Look(
        seconds=seconds,
        cpu_seconds=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        done=stage.way(process, latest),
        counted=stage.counts(process, latest),
        rss_bytes=1024 * status["VmRSS"],
        handles=len(os.listdir(f"/proc/{process}/fd")),  # noqa: PTH208
        threads=status["Threads"],
    )


def fields(text: str) -> dict[str, int]:
    """The numbers of a file of /proc, by name."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):\s*(\d+)", text, re.M)}


def scaled(looks: Sequence[Look], samples: int) -> list[Look]:
    """The way from 0 to 1, and the counts up to the number of samples."""
    first, last = looks[0].done, max(looks[-1].done, looks[0].done + 1)
    end = max(looks[-1].counted, 1)
    return [
        Look(
            **{
                **asdict(look),
                "done": (look.done - first) / (last - first),
                "counted": look.counted * samples / end,
            }
        )
        for look in looks
    ]


def growth(stage: dict[str, Any]) -> list[str]:
    """What a command gained on its way, where it is too much."""
    begin, rest, problems = at(stage, FROM), after(stage, FROM), []
    for name, limit, unit in (
        ("rss_bytes", LIMIT_BYTES, 1e6),
        ("handles", LIMIT_HANDLES + 1, 1),
        ("threads", LIMIT_HANDLES + 1, 1),
    ):
        # The end counts, and not a peak in between: memory that comes and goes is no growth.
        tail = sorted(look[name] for look in rest[-max(1, len(rest) // 8) :])
        gained = tail[len(tail) // 2] - begin[name]
        if gained >= limit:
            problems.append(
                f"{stage['name']}: {name} grows from {begin[name] / unit:.0f} after a fifth of the "
                f"way to {(begin[name] + gained) / unit:.0f}"
                + (" (MB)" if name == "rss_bytes" else "")
            )
    return problems


def at(stage: dict[str, Any], part: float) -> dict[str, Any]:
    """The first look at or after a part of the way."""
    looks: list[dict[str, Any]] = stage["looks"]
    return next((look for look in looks if look["done"] >= part), looks[-1])


def after(stage: dict[str, Any], part: float) -> list[dict[str, Any]]:
    """The looks at or after a part of the way; the last one where a command was too quick."""
    return [look for look in stage["looks"] if look["done"] >= part] or [at(stage, part)]


def pace(stage: dict[str, Any], start: float, stop: float) -> tuple[float, float]:
    """Samples per second, and processor's seconds per sample, between two parts of the count.

    NaN where it was not seen.
    """
    # A count that is told now and then stands still in between: where it moves is what counts.
    # Not the last: a training says it after its validation.
    points, before = [], -1.0
    for look in stage["looks"]:
        if look["counted"] > before:
            points.append((look["seconds"], look["cpu_seconds"], look["counted"]))
            before = look["counted"]
    whole = stage["samples"]
    within = [point for point in points[:-1] if start * whole <= point[2] <= stop * whole]
    if len(within) < 2:
        return float("nan"), float("nan")
    seconds, cpu, number = (last - first for first, last in zip(within[0], within[-1], strict=True))
    return number / seconds, cpu / number


def table(found: dict[str, Any]) -> str:
    """Markdown: a line per command."""
    header = ["command", "samples", "s", "samples/s, 10-20 %", "last tenth"]
    header += ["processor, ms per sample, 10-20 %", "last tenth"]
    header += ["MB at 10 %", "50 %", "100 %", "most", "handles at 20 %", "most after"]
    header += ["threads at 20 %", "most after"]
    lines = [header, ["---"] * len(header)]
    for stage in found["stages"]:
        memory = [at(stage, part)["rss_bytes"] for part in (0.1, 0.5, 1.0)]
        memory.append(max(look["rss_bytes"] for look in stage["looks"]))
        rest = after(stage, FROM)
        line = [stage["name"], f"{stage['samples']:,}", f"{stage['seconds']:.0f}"]
        paces = pace(stage, 0.1, 0.2), pace(stage, 0.9, 1.0)
        line += [f"{rate:.1f}" for rate, _ in paces] + [f"{1e3 * cpu:.1f}" for _, cpu in paces]
        line += [f"{value / 1e6:.0f}" for value in memory]
        for name in ("handles", "threads"):
            line += [str(at(stage, FROM)[name]), str(max(look[name] for look in rest))]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
