"""``psd extract`` and ``psd cache`` as people type them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.main import run
from pathsegdiff.features.seal import sealed, unsealed
from pathsegdiff.features.stage_one import StageOne
from pathsegdiff.features.store import FeatureStore, checksum
from tests.helpers_data import make_glas
from tests.helpers_stage_one import TOLERANCE, make_bundle, write_dataset


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a micro bundle and a data set, and nothing else."""
    make_bundle(tmp_path / "micro")
    write_dataset(tmp_path / "data", train=1, test=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def psd(capsys, *arguments):
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


EXTRACT = ("extract", "--dataset", "data/discs.toml", "--model", "micro")


def test_extract_says_what_it_wrote_and_resumes(place, capsys):
    code, out, _ = psd(capsys, *EXTRACT)
    assert (code, out) == (
        0,
        "2 samples written, 0 already complete: features/discs-micro-t50.zarr\n",
    )
    code, out, _ = psd(capsys, *EXTRACT)
    assert (code, out) == (
        0,
        "0 samples written, 2 already complete: features/discs-micro-t50.zarr\n",
    )


def test_batches_of_1_3_and_8_give_the_same_store_but_for_rounding(place, capsys, monkeypatch):
    """Nine patches, so that no size divides them all and none is cut short."""
    manifest = place / "data" / "discs.toml"
    manifest.write_text(manifest.read_text().replace("region_px = 512", "region_px = 768"))
    noise = []
    real = StageOne.prepare

    def prepare(self, image, sample_id):
        region = real(self, image, sample_id)
        noise.append(region.noise.numpy().tobytes())
        return region

    monkeypatch.setattr(StageOne, "prepare", prepare)
    stores = []
    options = (*EXTRACT, "--split", "test", "--dtype", "float32")
    for size in (1, 3, 8):
        arguments = (*options, "--batch-size", size, "--out", f"{size}.zarr")
        assert psd(capsys, *arguments)[0] == 0
        stores.append(FeatureStore.open(f"{size}.zarr"))
        # The size is no part of the recipe: any other goes on with the store.
        assert psd(capsys, *options, "--batch-size", 2, "--out", f"{size}.zarr")[1].startswith("0 ")
    assert noise == [noise[0]] * 3
    plain, sample = stores[1], stores[1].samples()[0]
    for store in stores:
        assert store.fingerprint == plain.fingerprint
        assert store.image(sample).tobytes() == plain.image(sample).tobytes()
        assert store.label(sample).tobytes() == plain.label(sample).tobytes()
        for name in plain.levels:
            expected = plain.read_level(sample, name)
            limit = TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(store.read_level(sample, name), expected, rtol=0, atol=limit)
        np.testing.assert_allclose(
            store.embedding(sample), plain.embedding(sample), rtol=TOLERANCE, atol=TOLERANCE
        )


def test_several_timesteps_and_both_conditions_make_named_stores(place, capsys):
    code, _, _ = psd(capsys, *EXTRACT, "--split", "test", "--t", "50,100", "--cond", "both")
    assert code == 0
    names = sorted(path.name for path in (place / "features").iterdir())
    assert names == [
        "discs-micro-t100-null.zarr",
        "discs-micro-t100.zarr",
        "discs-micro-t50-null.zarr",
        "discs-micro-t50.zarr",
    ]


def test_a_dry_run_writes_nothing(place, capsys):
    code, out, _ = psd(capsys, *EXTRACT, "--dry-run")
    assert code == 0
    assert out.startswith("2 samples, 8 patches; ")
    assert "s per patch" in out
    assert not (place / "features").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--t", "1000"), r"t must be in [0, 999], got 1000"),
        (("--taps", "up_12"), "no tap is called 'up_12'"),
        (("--split", "validation"), "has no split 'validation'; there are train, test"),
        (("--device", "cuda:9"), "device cuda:9 asked for, but torch sees"),
        (("--device", "tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (("--out", "data"), "data exists and is no feature store; choose another --out"),
        (("--model", "nothing"), "nothing"),
        (("--data-root", "elsewhere"), "elsewhere"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_1(place, capsys, arguments, message):
    code, out, err = psd(capsys, *EXTRACT, *arguments)
    assert code == 1
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in err


def test_bad_usage_is_exit_code_2(place, capsys):
    assert psd(capsys, "extract")[0] == 2
    assert psd(capsys, *EXTRACT, "--t", "soon")[0] == 2
    assert psd(capsys, "no-such-command")[0] == 2


def test_ctrl_c_is_exit_code_130(place, capsys, monkeypatch):
    from pathsegdiff.features import extract

    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(extract, "extract_dataset", interrupted)
    code, _, err = psd(capsys, *EXTRACT)
    assert code == 130
    assert "everything finished so far is kept" in err


def test_a_full_disk_is_one_line(place, capsys, monkeypatch):
    import errno

    from pathsegdiff.features.writer import StoreWriter

    def full(self, sample, arrays):
        raise OSError(errno.ENOSPC, "No space left on device", "features/x")

    monkeypatch.setattr(StoreWriter, "write", full)
    code, _, err = psd(capsys, *EXTRACT)
    assert code == 1
    assert "Error: no space left on the disk of features/" in err
    assert "2 samples are not written yet and need about " in err


def test_a_store_of_other_settings_is_refused_with_the_way_out(place, capsys):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    code, _, err = psd(capsys, *EXTRACT, "--out", "s.zarr", "--seed", "7")
    assert code == 1
    assert (
        "s.zarr was made with seed 0, this run asks for 7. Use --seed 0, or another --out." in err
    )


def test_several_stores_do_not_go_into_one(place, capsys):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    code, _, err = psd(capsys, *EXTRACT, "--out", "s.zarr", "--t", "50,100")
    assert code == 1
    assert "s.zarr is one store, but 2 timesteps and conditions need one each" in err


def contents(store):
    """Every file of a store but the locks, byte by byte."""
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted(Path(store).rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def test_cache_info_verify_repair_and_export(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["psd", *EXTRACT, "--out", "s.zarr"])
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    whole = contents("s.zarr")
    code, out, _ = psd(capsys, "cache", "info", "s.zarr")
    assert code == 0
    assert "random weights" in out
    assert "test: 1 of 1 samples complete" in out
    code, out, _ = psd(capsys, "cache", "verify", "s.zarr")
    assert (code, out) == (0, "2 complete samples, all whole: s.zarr\n")

    code, out, _ = psd(capsys, "cache", "export", "s.zarr", "--sample", "test_0", "--out", "npz")
    assert code == 0
    store = FeatureStore.open("s.zarr")
    with np.load(place / "npz" / "test_0.npz") as exported:
        dense = store.dense(store.samples("test")[0])
        np.testing.assert_array_equal(exported["features"], dense.astype(np.float16))

    (place / "s.zarr" / "image" / "c" / "0" / "0" / "0" / "0").write_bytes(b"nothing")
    code, out, err = psd(capsys, "cache", "verify", "s.zarr")
    assert code == 1
    assert "train_0: image/c/0/0/0/0 has 7 bytes instead of" in out
    assert "1 of 2 samples are damaged" in err
    code, out, _ = psd(capsys, "cache", "repair", "s.zarr", "--marks-only")
    assert code == 0
    assert "train_0: mark taken away" in out
    assert "made with: psd extract --dataset" in out and "samples written" not in out
    assert psd(capsys, *EXTRACT, "--out", "s.zarr")[1].startswith("1 samples written, 1 already")
    assert psd(capsys, "cache", "verify", "s.zarr")[0] == 0
    assert contents("s.zarr") == whole

    (place / "s.zarr" / "label" / "c" / "1" / "0" / "0").write_bytes(b"nothing")
    code, out, _ = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 0
    assert "test_0: will be extracted again" in out
    assert "1 samples written, 1 already complete: s.zarr" in out
    assert contents("s.zarr") == whole
    assert psd(capsys, "cache", "repair", "s.zarr")[1] == "nothing to repair: s.zarr\n"


@pytest.mark.parametrize("key", ["zarr.json", "samples.json", "label/zarr.json", "backup.json"])
@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"{nothing")])
def test_the_stores_own_files_are_put_back_from_their_second_copy(place, capsys, key, spoil):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    whole = contents("s.zarr")
    spoil(place / "s.zarr" / key)
    code, _, err = psd(capsys, "cache", "verify", "s.zarr")
    assert code == 1
    assert "run `psd cache repair s.zarr`" in err
    if key != "backup.json":  # no more samples are put into a store that is not whole
        assert psd(capsys, *EXTRACT, "--out", "s.zarr")[0] == 1
    code, out, _ = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 0
    assert f"{key}: " in out and "repaired: s.zarr" in out
    assert contents("s.zarr") == whole
    assert psd(capsys, "cache", "verify", "s.zarr")[0] == 0


def test_what_is_damaged_twice_is_said_and_nothing_is_changed(place, capsys):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    for key in ("label/zarr.json", "backup.json"):
        (place / "s.zarr" / key).write_bytes(b"{nothing")
    broken = contents("s.zarr")
    code, _, err = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 1
    assert "label/zarr.json is missing or damaged, and so is its second copy" in err
    assert "delete the store and extract it again" in err
    assert contents("s.zarr") == broken
    assert psd(capsys, "cache", "repair", "nowhere.zarr")[0] == 1


@pytest.mark.parametrize("table_is_there", [True, False])
def test_nothing_is_put_back_outside_the_store(place, capsys, table_is_there):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    key, content = "../elsewhere/zarr.json", b"hostile"
    copy = unsealed((place / "s.zarr" / "backup.json").read_bytes())
    table = unsealed(copy["files"]["samples.json"].encode())
    table["files"][key] = [checksum(content)]
    copy["files"] |= {key: content.decode(), "samples.json": sealed(table).decode()}
    (place / "elsewhere").mkdir()
    (place / "s.zarr" / "backup.json").write_bytes(sealed(copy))
    if table_is_there:
        (place / "s.zarr" / "samples.json").write_bytes(sealed(table))
    else:
        (place / "s.zarr" / "samples.json").unlink()
    code, _, err = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 1
    assert "samples.json is missing or damaged, and so is its second copy" in err
    assert not list((place / "elsewhere").iterdir())


def test_samples_without_their_marks_are_said_and_repair_makes_them(place, capsys):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    whole = contents("s.zarr")
    shutil.rmtree(place / "s.zarr" / "marks")
    assert psd(capsys, "cache", "repair", "s.zarr")[0] == 0
    assert contents("s.zarr") == whole
    (place / "s.zarr" / "marks" / "00000001.json").unlink()
    code, out, _ = psd(capsys, "cache", "verify", "s.zarr")
    assert code == 0
    assert "1 more are listed but not complete" in out
    code, out, _ = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 0
    assert "1 samples are not complete and will be extracted" in out
    assert contents("s.zarr") == whole


@pytest.mark.parametrize(("suffix", "kind"), [("", "image"), ("_anno", "mask")])
def test_repair_makes_no_sample_from_pixels_that_have_changed(place, capsys, suffix, kind):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    shutil.rmtree(place / "s.zarr" / "label" / "c" / "1")
    file = place / "data" / "images" / f"test_0{suffix}.png"
    before = file.read_bytes()
    pixels = np.array(Image.open(file))
    pixels[5, 5] = 1
    Image.fromarray(pixels).save(file)
    code, _, err = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 1
    assert f"the {kind} of sample test_0 has changed since it was extracted" in err
    assert len(list((place / "s.zarr" / "marks").iterdir())) == 2
    file.write_bytes(before)
    assert psd(capsys, "cache", "repair", "s.zarr")[0] == 0
    assert psd(capsys, "cache", "verify", "s.zarr")[0] == 0


@pytest.mark.parametrize("batch_size", ["2", "4"])
def test_repair_computes_in_the_batches_that_the_store_was_made_in(place, capsys, batch_size):
    psd(capsys, *EXTRACT, "--out", "s.zarr", "--batch-size", batch_size)
    whole = contents("s.zarr")
    shutil.rmtree(place / "s.zarr" / "label" / "c" / "1")
    code, out, _ = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 0
    assert f"--batch-size {batch_size}" in out
    assert contents("s.zarr") == whole


def test_repair_takes_no_mark_away_where_the_data_set_has_the_sample_no_more(place, capsys):
    write_dataset(place / "more", train=2)
    command = [part.replace("data/", "more/") for part in EXTRACT]
    assert psd(capsys, *command, "--out", "s.zarr")[0] == 0
    table, name = place / "more" / "discs.csv", "train_1"
    kept = [line for line in table.read_text().splitlines(True) if name not in line]
    table.write_text("".join(kept))
    sample = next(s for s in FeatureStore.open("s.zarr").samples() if s.sample_id == name)
    shutil.rmtree(place / "s.zarr" / "label" / "c" / str(sample.index))
    code, _, err = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 1
    assert f"sample {name} is damaged, and the data set has it no more" in err
    assert len(list((place / "s.zarr" / "marks").iterdir())) == 3


def test_marks_that_are_newer_than_the_table_are_taken_away(place, capsys):
    """As in a copy of a store that was growing while it was copied."""
    psd(capsys, *EXTRACT, "--out", "s.zarr", "--split", "train")
    older = {key: (place / "s.zarr" / key).read_bytes() for key in ("samples.json", "backup.json")}
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    whole = contents("s.zarr")
    for key, content in older.items():
        (place / "s.zarr" / key).write_bytes(content)
    assert psd(capsys, "cache", "verify", "s.zarr")[0] == 1
    code, out, _ = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 0
    assert "1 marks of samples that the store does not list: taken away" in out
    assert psd(capsys, *EXTRACT, "--out", "s.zarr")[0] == 0
    assert contents("s.zarr") == whole


def test_a_copy_that_is_behind_is_named_and_still_mends_an_array(place, capsys):
    psd(capsys, *EXTRACT, "--out", "s.zarr", "--split", "train")
    older = (place / "s.zarr" / "backup.json").read_bytes()
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    whole = contents("s.zarr")
    (place / "s.zarr" / "backup.json").write_bytes(older)
    code, out, _ = psd(capsys, "cache", "verify", "s.zarr")
    assert code == 0  # nothing is damaged
    assert "backup.json is older than the table of samples; `psd cache repair s.zarr`" in out
    (place / "s.zarr" / "label" / "zarr.json").unlink()
    assert psd(capsys, "cache", "repair", "s.zarr")[0] == 0
    assert contents("s.zarr") == whole
    assert "older" not in psd(capsys, "cache", "verify", "s.zarr")[1]


@pytest.mark.parametrize("gone", [("zarr.json",), ("zarr.json", "backup.json")])
def test_a_store_without_its_zarr_json_says_what_to_do_and_no_remedy_leads_back(
    place, capsys, gone
):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    whole = contents("s.zarr")
    for key in gone:
        (place / "s.zarr" / key).unlink()
    code, _, err = psd(capsys, *EXTRACT, "--out", "s.zarr")
    assert code == 1
    code, _, said = psd(capsys, "cache", "repair", "s.zarr")
    if len(gone) == 1:
        assert "run `psd cache repair s.zarr`" in err
        assert code == 0 and contents("s.zarr") == whole
    else:
        assert "put the file back, or choose another --out" in err
        assert "zarr.json and backup.json are both gone; delete the store" in said


def test_repair_takes_no_mark_away_where_it_does_not_know_the_extraction(place, capsys):
    psd(capsys, *EXTRACT, "--out", "s.zarr")
    group = json.loads((place / "s.zarr" / "zarr.json").read_text())
    del group["attributes"]["pathsegdiff"]["provenance"]["extraction"]
    shutil.rmtree(place / "s.zarr" / "label" / "c" / "1")
    (place / "s.zarr" / "zarr.json").write_text(json.dumps(group))
    # As if it had been made so: the table vouches for the group's file.
    table = unsealed((place / "s.zarr" / "samples.json").read_bytes())
    content = (place / "s.zarr" / "zarr.json").read_bytes()
    table["files"]["zarr.json"] = [checksum(content)]
    (place / "s.zarr" / "samples.json").write_bytes(sealed(table))
    code, _, err = psd(capsys, "cache", "repair", "s.zarr")
    assert code == 1
    assert "does not say what it was made from; use --marks-only" in err
    assert len(list((place / "s.zarr" / "marks").iterdir())) == 2
    assert psd(capsys, "cache", "repair", "s.zarr", "--marks-only")[0] == 0
    assert psd(capsys, *EXTRACT, "--out", "s.zarr")[1].startswith("1 samples written, 1 already")


def test_a_real_file_size_limit_stops_in_one_line_and_resumes(place):
    """The kernel refuses the write: a stand-in for a full disk that needs no mount."""
    import subprocess
    import sys

    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *EXTRACT, "--out", "s.zarr"]
    stopped = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert stopped.returncode == 1, stopped.stderr
    assert "Error: the file size limit was reached" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    resumed = [sys.executable, "-m", "cli", *EXTRACT, "--out", "s.zarr"]
    again = subprocess.run(resumed, capture_output=True, text=True, cwd=place, check=True)
    assert "2 samples written, 0 already complete" in again.stdout
    assert FeatureStore.open(place / "s.zarr").samples()


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.55), ("float16-5bit", 0.95)])
def test_rounded_features_resume_verify_export_and_take_fewer_bytes(place, capsys, dtype, share):
    assert psd(capsys, *EXTRACT)[0] == 0
    command = (*EXTRACT, "--dtype", dtype, "--tokens", "--out", "small.zarr")
    assert psd(capsys, *command, "--split", "train")[0] == 0
    assert "1 samples written, 1 already complete" in psd(capsys, *command)[1]
    assert psd(capsys, "cache", "verify", "small.zarr")[0] == 0
    whole, small = (
        FeatureStore.open("features/discs-micro-t50.zarr"),
        FeatureStore.open("small.zarr"),
    )
    sizes = [
        sum(size for name, size in store.bytes_of(store.samples()[0]).items() if "stride" in name)
        for store in (whole, small)
    ]
    assert sizes[1] < share * sizes[0]
    assert psd(capsys, "cache", "export", "small.zarr", "--out", "exported")[0] == 0
    exported = sorted((place / "exported").iterdir())
    assert len(exported) == 2
    with np.load(exported[0]) as file:
        assert file["features"].dtype == ("float32" if dtype == "int8" else "float16")
    by_id = {sample.sample_id: sample for sample in small.samples()}
    for sample in whole.samples():
        exact = whole.dense(sample)
        error = small.dense(by_id[sample.sample_id]) - exact
        assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact)
    code, _, err = psd(capsys, *EXTRACT, "--out", "small.zarr")
    assert code == 1
    assert f"was made with dtype {dtype}, this run asks for float16" in err


def test_patches_of_another_size_than_the_models_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_glas(tmp_path)
    assert run(["models", "init", "--preset", "micro", "--out", "micro"]) == 0
    command = ["-q", "extract", "--dataset", "glaslike.toml", "--model", "micro"]
    for more in ([], ["--dry-run"]):
        capsys.readouterr()
        assert run([*command, *more]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "patches of 32 px, the model sees 256; set patch_px = 256" in said
    assert not list(tmp_path.glob("features/*"))
