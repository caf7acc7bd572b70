"""Nothing lost, nothing silently wrong: killed, without power, damaged, several at once.

A few repetitions of each run always; the counts of docs/reliability.md are marked slow.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from cli.main import run
from pathsegdiff.errors import StoreError
from pathsegdiff.features.seal import unsealed
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.features.verify import verify_store
from pathsegdiff.features.writer import StoreWriter, open_existing
from tests.helpers_head import same
from tests.helpers_stage_one import make_bundle, write_dataset
from tests.helpers_store import GLANDS, TAPS, build_store, make_arrays, make_label, make_samples
from tests.helpers_store import open_writer as opened_writer

ROOT = Path(__file__).parents[1]
EXTRACT = ("extract", "--dataset", "data/discs.toml", "--model", "micro", "--out")
TRAIN = ("train-head", "--features", "whole.zarr", "--steps", "12", "--crop", "256", "--val", "0.4",
         "--batch-size", "2", "--lr", "1e-3", "--schedule", "cosine", "--out")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a micro bundle, five images, and a store of them that nothing happened to."""
    folder = tmp_path_factory.mktemp("reliability")
    make_bundle(folder / "micro")
    write_dataset(folder / "data", train=4, test=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run([*EXTRACT, "whole.zarr"]) == 0
        assert run([*TRAIN, "whole-run"]) == 0
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def values_of(store):
    """Every file of a store, byte by byte, but for the time and command that it was made with."""
    found = {}
    for file in sorted(Path(store).rglob("*")):
        name = str(file.relative_to(store))
        if not file.is_file() or file.suffix in (".partial", ".new") or name.startswith("."):
            continue
        found[name] = file.read_bytes()
    kept = unsealed(found.pop("backup.json"))["files"]
    # The copy is of the files as they are.
    assert kept == {key: Path(store, key).read_text() for key in kept}
    assert set(kept) >= {"zarr.json", "samples.json", "label/zarr.json"}
    group = json.loads(found.pop("zarr.json"))
    del group["attributes"]["pathsegdiff"]["provenance"]
    return found | {"zarr.json": group, "samples.json": unsealed(found["samples.json"])["samples"]}


def killed_at(moment, *arguments):
    """Run psd in a process of its own and kill it; its exit code, and what it had counted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers_kill", str(moment), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1])


def moments(number, *arguments):
    """Some of the moments of a run, the same each time: the first ones, the rest at random."""
    code, counted = killed_at(0, *arguments)
    assert code == 0
    draw = random.Random(0)
    return sorted(draw.sample(range(2, counted["moments"]), number))


# -- killed --


def check_killed_extraction(number):
    chosen = moments(number, *EXTRACT, "counted.zarr")
    expected = values_of("whole.zarr")
    for moment in chosen:
        store = Path(f"killed-{moment}.zarr")
        code, _ = killed_at(moment, *EXTRACT, str(store))
        assert code == -signal.SIGKILL, moment
        marks = {file.name: file.stat().st_mtime_ns for file in store.glob("marks/*.json")}
        if (store / "zarr.json").exists():
            assert not verify_store(FeatureStore.open(store)), moment
        assert run([*EXTRACT, str(store)]) == 0, moment
        assert values_of(store) == expected, moment
        # What was complete was not made again.
        assert all((store / "marks" / name).stat().st_mtime_ns == t for name, t in marks.items())
        shutil.rmtree(store)
    shutil.rmtree("counted.zarr")


def check_killed_training(number):
    chosen = moments(number, *TRAIN, "counted-run")
    expected = load_file("whole-run/head.safetensors")
    for moment in chosen:
        out = f"killed-run-{moment}"
        code, _ = killed_at(moment, *TRAIN, out)
        assert code == -signal.SIGKILL, moment
        assert run([*TRAIN, out]) == 0, moment
        assert same(load_file(f"{out}/head.safetensors"), expected), moment
        assert Path(out, "log.csv").read_text().count("\n") == Path(
            "whole-run/log.csv"
        ).read_text().count("\n")
        shutil.rmtree(out)
    shutil.rmtree("counted-run")


def check_killed_pretraining(number, part, steps):
    command = ("pretrain", part, "--preset", "micro", "--images", "demo", "--steps", str(steps))
    chosen = moments(number, *command, "--out", "counted")
    expected = weights_of("counted")
    assert expected
    for moment in chosen:
        out = f"killed-{moment}"
        code, counted = killed_at(moment, *command, "--out", out)
        assert code == -signal.SIGKILL, moment
        code, again = killed_at(0, *command, "--out", out)
        assert code == 0, moment
        # A checkpoint follows every step here, and no more than one interval is lost.
        all_steps = steps * (3 if part == "all" else 1)
        assert counted["steps"] + again["steps"] <= all_steps + 1, moment
        assert weights_of(out) == expected, moment
        for folder in Path().glob(f"{out}*"):
            shutil.rmtree(folder)
    for folder in Path().glob("counted*"):
        shutil.rmtree(folder)


def weights_of(out):
    """Every file of weights that a pre-training leaves, byte by byte."""
    files = [file for folder in (out, f"{out}-training") for file in Path(folder).rglob("*")]
    return {
        str(file).replace(out, "", 1): file.read_bytes()
        for file in files
        if file.suffix == ".safetensors"
    }


def test_an_extraction_that_is_killed_goes_on_and_ends_with_the_same_bytes():
    check_killed_extraction(2)


def test_a_training_that_is_killed_goes_on_and_ends_with_the_same_weights():
    check_killed_training(1)


def test_a_pretraining_that_is_killed_goes_on_and_ends_with_the_same_weights():
    check_killed_pretraining(1, "encoder", 2)


@pytest.mark.slow
def test_an_extraction_is_killed_25_times():
    check_killed_extraction(25)


@pytest.mark.slow
def test_a_training_is_killed_25_times():
    check_killed_training(25)


@pytest.mark.slow
def test_a_pretraining_is_killed_25_times():
    check_killed_pretraining(25, "all", 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_finished(number):
    store = Path(f"signal-{number}.zarr")
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *EXTRACT, str(store)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(store.glob("marks/*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert "Traceback" not in said
    assert not verify_store(FeatureStore.open(store))
    assert run([*EXTRACT, str(store)]) == 0
    assert values_of(store) == values_of("whole.zarr")
    shutil.rmtree(store)


# -- without power --


class Disk:
    """What of a folder would be there after a loss of power: what was synced, and no more.

    ``names`` says what a folder lists: "synced", as of its last sync; "now", every name, as a file
    system may have written it early. A file has the bytes of its own last sync; one that never had
    any is there but empty.
    """

    def __init__(self, root, monkeypatch):
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {}
        self.sync, self.after = os.fsync, lambda: None
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            names = {entry.name: entry.inode() for entry in os.scandir(path)}
            self.folders[os.fstat(descriptor).st_ino] = names
        else:
            self.contents[os.fstat(descriptor).st_ino] = path.read_bytes()
        self.sync(descriptor)
        self.after()

    def restore(self, target, names):
        """Lay out what would be there."""
        shutil.rmtree(target, ignore_errors=True)
        self._folder(self.root, target, names)

    def _folder(self, folder, target, names):
        target.mkdir(parents=True)
        listed = self.folders.get(folder.stat().st_ino, {})
        if names == "now":
            listed = {entry.name: entry.inode() for entry in os.scandir(folder)}
        for name, inode in listed.items():
            if (folder / name).is_dir():
                self._folder(folder / name, target / name, names)
            else:
                (target / name).write_bytes(self.contents.get(inode, b""))


def lose_power(tmp_path, monkeypatch, names, every):
    """At every so many of the syncs of a store's making and growing."""
    root, after = tmp_path / "s.zarr", tmp_path / "after"
    root.mkdir()
    disk = Disk(root, monkeypatch)
    seen, syncs = [], iter(range(10_000))

    def look():
        if next(syncs) % every:
            return
        disk.after = lambda: None
        disk.restore(after, names)
        if (after / "zarr.json").exists():
            store = FeatureStore.open(after)
            assert not verify_store(store)
            seen.append(len(store.samples()))
        # Whatever is there, the extraction goes on from it.
        with opened_writer(after) as writer:
            writer.register(make_samples(2, 1))
        disk.after = look

    disk.after = look
    rng = np.random.default_rng(0)
    with opened_writer(root) as writer:
        for samples in (make_samples(1, 0), make_samples(1, 1)):
            for sample in writer.register(samples):
                if not writer.is_marked(sample):
                    label = make_label(rng, GLANDS, 64)
                    writer.write(sample, make_arrays(rng, label, GLANDS, TAPS, 32))
    assert next(syncs) > 100
    assert seen == sorted(seen) and set(seen) >= {0, 1}
    disk.restore(after, names)  # with the last mark on the disk, all is
    assert len(FeatureStore.open(after).samples()) == 2


@pytest.mark.parametrize("names", ["synced", "now"])
def test_a_loss_of_power_leaves_a_valid_store(tmp_path, monkeypatch, names):
    lose_power(tmp_path, monkeypatch, names, 11)


@pytest.mark.slow
@pytest.mark.parametrize("names", ["synced", "now"])
def test_a_loss_of_power_leaves_a_valid_store_at_every_moment(tmp_path, monkeypatch, names):
    lose_power(tmp_path, monkeypatch, names, 1)


# -- damaged --


KINDS = {
    "features": "stride_*/c/**/*",
    "metadata": "**/zarr.json",
    "table": "samples.json",
    "copy": "backup.json",
    "labels": "label/c/**/*",
    "images": "image/c/**/*",
    "embeddings": "embedding/c/**/*",
    "objects": "instances/*/c/**/*",
    "marks": "marks/*.json",
}


def read_all(store):
    """Everything that a reader can ask for."""
    found = {}
    for sample in store.samples():
        for level in store.levels:
            found[sample.sample_id, level] = store.read_level(sample, level)
        found[sample.sample_id, "label"] = store.label(sample)
        found[sample.sample_id, "image"] = store.image(sample)
        found[sample.sample_id, "embedding"] = store.embedding(sample)
        found[sample.sample_id, "instances"] = store.instances(sample)
        found[sample.sample_id, "row"] = np.array([str(sample.to_dict())])
    return found


def break_file(file, how, draw):
    """Flip a bit, cut the end off, or delete it; returns where."""
    whole = file.read_bytes()
    place = draw.randrange(len(whole))
    if how == "flip":
        broken = bytearray(whole)
        broken[place] ^= 1 << draw.randrange(8)
        file.write_bytes(broken)
    elif how == "cut":
        file.write_bytes(whole[:place])
    else:
        file.unlink()
    return place


def damage(kind, number, how, tmp_path):
    """Break one file of a kind, look, mend it, and so on; returns how often it was silent."""
    path = tmp_path / "shapes.zarr"
    build_store(path, train=3, test=1)
    expected = read_all(FeatureStore.open(path))
    draw = random.Random(f"{kind} {how}")
    files = sorted(file for file in path.glob(KINDS[kind]) if file.is_file())
    assert files
    silent = []
    for _ in range(number):
        file = draw.choice(files)
        whole = file.read_bytes()
        place = break_file(file, how, draw)
        where = f"{how} {file.relative_to(path)} at {place}"
        try:
            findings = verify_store(FeatureStore.open(path))
            named = [finding.problem for finding in findings]
        except StoreError as error:
            named = [str(error)]
        if kind == "marks" and how == "delete":
            # Not damage: the sample is not complete, and is extracted again.
            assert len(FeatureStore.open(path).samples()) == 3
        elif not named:
            silent.append(f"verify: {where}")
        try:
            found = read_all(FeatureStore.open(path))
        except StoreError:
            pass
        else:
            for key, values in found.items():
                if not np.array_equal(values, expected[key]):
                    silent.append(f"read: {where}: {key}")
            # A group's own zarr.json is not needed to read right values.
            spared = kind in ("marks", "metadata", "copy")
            if not spared and len(found) == len(expected) and how != "flip":
                silent.append(f"read: {where}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(whole)
    return silent


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_never_read(kind, how, tmp_path):
    assert damage(kind, 4, how, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("how", "number"), [("flip", 40), ("cut", 20), ("delete", 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_never_read_many_times(kind, how, number, tmp_path):
    assert damage(kind, number, how, tmp_path) == []


def repair(kind, number, how):
    """Break one file of a kind, and let ``psd cache repair`` mend it."""
    store = Path("broken.zarr")
    shutil.copytree("whole.zarr", store)
    expected = values_of(store)
    draw = random.Random(f"repair {kind} {how}")
    files = sorted(file for file in store.glob(KINDS[kind]) if file.is_file())
    for _ in range(number):
        file = draw.choice(files)
        place = break_file(file, how, draw)
        assert run(["cache", "repair", str(store)]) == 0, (file, place)
        assert values_of(store) == expected, (file, place)
    shutil.rmtree(store)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("features", "flip"), ("metadata", "cut"), ("table", "flip"), ("marks", "delete")],
)
def test_repair_ends_with_the_bytes_of_the_original(kind, how):
    repair(kind, 1, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
@pytest.mark.parametrize("kind", KINDS)
def test_repair_ends_with_the_bytes_of_the_original_many_times(kind, how):
    repair(kind, 5, how)


# -- several at once --


def start(store, errors=subprocess.PIPE):
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *EXTRACT, store],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=errors,
        stdout=subprocess.PIPE,
        text=True,
    )


def written(said):
    """Samples that a process says it wrote."""
    return int(said.split(" samples written", 1)[0].rsplit("\n", 1)[-1])


@pytest.mark.parametrize("number", [3])
def test_processes_share_a_store_and_no_sample_is_made_twice(number):
    running = [start("shared.zarr") for _ in range(number)]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * number, said
    assert sum(written(out) for out, _ in said) == 5
    assert values_of("shared.zarr") == values_of("whole.zarr")
    shutil.rmtree("shared.zarr")


def test_the_claim_of_a_dead_process_is_taken_over_and_that_of_a_live_one_is_not():
    store = Path("left.zarr")
    # Killed while it writes its first sample: it has the claims of some.
    _, counted = killed_at(0, *EXTRACT, "counted.zarr")
    shutil.rmtree("counted.zarr")
    code, _ = killed_at(counted["moments"] - 60, *EXTRACT, str(store))
    assert code == -signal.SIGKILL
    claimed = list((store / ".claims").iterdir())
    assert claimed
    writer = StoreWriter.open(store, **_parts(FeatureStore.open("whole.zarr")))
    held = writer.claim(writer.store.registered()[-1])
    assert held is not None
    errors = Path("errors.txt")
    with errors.open("w") as file:
        running = start(str(store), file)
    deadline = time.monotonic() + 120
    while "Waiting for 1 samples of other processes" not in errors.read_text():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    # The dead process's samples are made, the one that somebody alive has is not.
    assert len(list(store.glob("marks/*.json"))) == 4
    time.sleep(1.0)
    assert running.poll() is None and not writer.is_marked(writer.store.registered()[-1])
    held.release(finished=False)
    running.communicate(timeout=120)
    assert running.returncode == 0, errors.read_text()
    assert values_of(store) == values_of("whole.zarr")
    assert not list((store / ".claims").iterdir())
    shutil.rmtree(store)


def test_a_process_that_makes_one_of_two_stores_waits_for_the_other():
    """It has a sample's claim in the one; somebody who then dies has it in the other."""
    both = ("extract", "--dataset", "data/discs.toml", "--model", "micro", "--t", "50,100", "--out")
    assert run([*both, "two"]) == 0
    stores = sorted(Path("two").glob("*.zarr"))
    held = []
    for store in stores:
        writer = open_existing(store)
        sample = writer.store.samples()[0]
        writer.forget(sample)
        held.append((writer, sample))
    claim = held[0][0].claim(held[0][1])
    assert claim is not None
    released = threading.Timer(3.0, claim.release, kwargs={"finished": False})
    released.start()
    assert run([*both, "two"]) == 0
    assert not released.is_alive()  # it did not end before it had both
    assert all(writer.is_marked(sample) for writer, sample in held)
    shutil.rmtree("two")


def test_a_write_that_fails_is_said_although_others_are_waited_for(monkeypatch, capsys):
    store = Path("failing.zarr")
    writer = StoreWriter.open(store, **_parts(FeatureStore.open("whole.zarr")))
    samples = writer.register(FeatureStore.open("whole.zarr").registered())
    claim = writer.claim(samples[0])
    assert claim is not None

    def refuse(self, sample, arrays):
        raise OSError(28, "No space left on device", str(store))

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", refuse)
        assert run([*EXTRACT, str(store)]) == 1
    assert "no space left" in capsys.readouterr().err.lower()
    claim.release(finished=False)
    # Nothing is held any more: the same process makes all of it.
    assert run([*EXTRACT, str(store)]) == 0
    assert values_of(store) == values_of("whole.zarr")
    shutil.rmtree(store)


def test_a_run_that_was_killed_at_its_first_file_begins_anew():
    out = Path("begun")
    out.mkdir()
    (out / ".config.json.4242.new").write_text("{")
    assert run([*TRAIN, str(out)]) == 0
    shutil.rmtree(out)


def _parts(store):
    return {
        "recipe": store.recipe,
        "card": store.card,
        "model": store.model,
        "levels": list(store.levels.values()),
        "tokens": None,
        "provenance": {},
    }


# -- the disk --


def check_extraction_fails(store, remove, monkeypatch, capsys):
    """One line that names the store, where ``remove`` is called before each region."""
    from pathsegdiff.features import extract

    real = extract.StageOne.run

    def run_after(self, *arguments):
        remove()
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(extract.StageOne, "run", run_after)
        assert run([*EXTRACT, store]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ") and store in error
    shutil.rmtree(store, ignore_errors=True)


def test_a_store_that_is_removed_meanwhile_is_one_line(monkeypatch, capsys):
    remove = partial(shutil.rmtree, "gone.zarr", ignore_errors=True)
    check_extraction_fails("gone.zarr", remove, monkeypatch, capsys)


@pytest.mark.parametrize("closed", ["**", "marks", "label/**"])
def test_a_folder_that_may_not_be_written_to_is_one_line(closed):
    """For root too, who may write anywhere unless that right is taken away."""
    store = Path("closed.zarr")
    shutil.copytree("whole.zarr", store)
    open_existing(store).forget(FeatureStore.open(store).samples()[0])
    expected = values_of(store)
    folders = [path for path in store.glob(closed) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    command = [sys.executable, "-m", "cli", *EXTRACT, str(store)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write anywhere here")
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    for folder in folders:
        folder.chmod(0o755)
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert error.startswith("Error: permission denied") and str(store) in error
    assert run([*EXTRACT, str(store)]) == 0
    assert values_of(store) == values_of("whole.zarr") != expected
    shutil.rmtree(store)


@pytest.mark.parametrize("part", ["zarr.json", "samples.json", "label", "marks/00000000.json"])
def test_a_store_that_is_removed_in_part_is_said_although_every_write_succeeds(
    part, monkeypatch, capsys
):
    regions = itertools.count(1)

    def remove():
        if next(regions) == 5:  # the last of them
            deadline = time.monotonic() + 120
            while not list(Path("partly.zarr").glob("marks/00000003.json")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            target = Path("partly.zarr", part)
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    check_extraction_fails("partly.zarr", remove, monkeypatch, capsys)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
def test_a_small_disk_that_fills_up_and_one_that_is_read_only_are_one_line(tmp_path, capsys):
    """On a disk of its own, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options):
        return subprocess.run(
            ["mount", *options, str(disk)], capture_output=True, check=False
        ).returncode

    if mount("-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        pytest.skip("mounting is not allowed here")
    try:
        assert run([*EXTRACT, str(disk / "s.zarr")]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("Error: no space left on the disk of ")
        done = len(list((disk / "s.zarr" / "marks").glob("*.json")))
        assert f": {5 - done} samples are not written yet" in error
        assert not verify_store(FeatureStore.open(disk / "s.zarr"))
        # So much room as it says is enough, half of it is not.
        missing = 1e6 * float(error.split("make room for ")[1].split(" MB")[0])
        mount("-o", f"remount,size={2 * 2**20 + int(missing / 2)}")
        assert run([*EXTRACT, str(disk / "s.zarr")]) == 1
        mount("-o", f"remount,size={2 * 2**20 + int(missing) + 100_000}")
        done = len(list((disk / "s.zarr" / "marks").glob("*.json")))
        mount("-o", "remount,ro")
        assert run([*EXTRACT, str(disk / "s.zarr")]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("Error: ") and "read-only" in error.lower()
        mount("-o", "remount,rw")
        assert run([*EXTRACT, str(disk / "s.zarr")]) == 0
        assert f"{5 - done} samples written, {done} already complete" in capsys.readouterr().out
        assert values_of(disk / "s.zarr") == values_of("whole.zarr")
    finally:
        subprocess.run(["umount", str(disk)], check=False)
