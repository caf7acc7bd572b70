"""``benchmarks/soak.py``: what it measures, and a small run of it."""

import importlib.util
import math
import shutil
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "soak.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def soak():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


def stage(soak, number=101, rss=lambda part: 400e6, handles=lambda part: 10, slow=1.0):
    """A command that was looked at every second, its second half slower by a factor."""
    looks, seconds = [], 0.0
    for step in range(number):
        part = step / (number - 1)
        looks.append(
            {
                "seconds": seconds,
                "cpu_seconds": seconds / 2,
                "done": part,
                "counted": 1000 * part,
                "rss_bytes": rss(part),
                "handles": handles(part),
                "threads": 4,
            }
        )
        seconds += slow if part >= 0.5 else 1.0
    return {"name": "extract", "samples": 1000, "seconds": seconds, "looks": looks}


def test_a_command_that_stays_as_it_is_after_a_fifth_of_its_way_does_not_grow(soak):
    # What is loaded at its beginning is no growth, nor what comes and goes.
    def rss(part):
        return 400e6 + (200e6 if 0.5 < part < 0.6 else 0) - (300e6 if part < 0.15 else 0)

    assert soak.growth(stage(soak, rss=rss)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rss": lambda part: 400e6 + 70e6 * part},
            "extract: rss_bytes grows from 414 after a fifth of the way to 467 (MB)",
        ),
        (
            {"handles": lambda part: 10 + round(10 * part)},
            "extract: handles grows from 12 after a fifth of the way to 20",
        ),
    ],
)
def test_a_command_that_grows_is_named_with_what_it_gains(soak, settings, message):
    assert soak.growth(stage(soak, **settings)) == [message]


def test_a_command_that_ends_before_it_is_seen_to_move_is_a_line_too(soak):
    quick = stage(soak)
    quick["looks"] = [{**look, "done": 0.0} for look in quick["looks"][:2]]
    assert soak.growth(quick) == []
    assert "| extract | 1,000 |" in soak.table({"stages": [quick]})


def test_the_pace_is_that_of_a_part_of_the_samples(soak):
    rate, cpu = soak.pace(stage(soak, slow=4.0), 0.1, 0.2)
    assert (rate, cpu) == (pytest.approx(10.0), pytest.approx(0.05))
    rate, cpu = soak.pace(stage(soak, slow=4.0), 0.9, 1.0)
    assert (rate, cpu) == (pytest.approx(2.5), pytest.approx(0.2))
    assert math.isnan(soak.pace(stage(soak, number=3), 0.1, 0.2)[0])


@pytest.mark.slow
def test_300_samples_go_through_every_command_and_nothing_grows(soak, tmp_path, monkeypatch):
    found = soak.soak(tmp_path, 300, seconds=0.1)
    assert [entry["name"] for entry in found["stages"]] == [
        "extract",
        "verify",
        "train-head",
        "eval",
    ]
    assert [entry["samples"] for entry in found["stages"]] == [300, 300, 240, 60]
    # Ten files of each sample, its mark among them; two groups, seven arrays, the table, the second
    # copy of these, the lock.
    assert found["files"] == 300 * 10 + 2 + 7 + 1 + 1 + 1
    for entry in found["stages"]:
        assert len(entry["looks"]) > 5
        assert max(look["handles"] for look in entry["looks"]) < 40
    extract = found["stages"][0]
    assert soak.growth(extract) == []
    assert "| extract | 300 |" in soak.table(found)
    # What has finished is not run again; what has not, is.
    monkeypatch.setattr(soak, "watch", None)
    assert soak.soak(tmp_path, 300)["stages"] == found["stages"]
    with pytest.raises(SystemExit, match="holds a run of 300 samples"):
        soak.soak(tmp_path, 301)
    shutil.rmtree(tmp_path / "s.zarr")
