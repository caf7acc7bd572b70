import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pathsegdiff.errors import RunError
from pathsegdiff.segmentation.runs import (
    check_fits,
    load_run,
    newest_run,
    newest_store,
    read_config,
)
from pathsegdiff.segmentation.sampling import CropRequest, RegionReader
from tests.helpers_head import train_small
from tests.helpers_store import TAPS, TISSUE, build_store, make_samples, open_writer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("runs") / "shapes.zarr", train=4, test=2)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train_small(store, out, steps=2)
    return out


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def edit(run, change):
    """Change the config of a run."""
    values = json.loads((run / "config.json").read_text())
    change(values)
    (run / "config.json").write_text(json.dumps(values))


def test_a_run_comes_back_as_it_was_trained(store, trained):
    run = load_run(trained)
    assert run.num_classes == 2
    assert not run.head.training
    assert not any(parameter.requires_grad for parameter in run.head.parameters())
    assert run.config.recipe == store.recipe
    assert run.config.card == store.card
    assert run.metadata["step"] == "2"
    assert run.device == torch.device("cpu")
    batch = RegionReader(store, run.config.levels).read([CropRequest(sample=store.samples()[0])])
    f = torch.from_numpy(store.dense(store.samples()[0]))[None]
    torch.testing.assert_close(run.head(batch), run.head.forward_dense(f), rtol=1e-3, atol=1e-4)


def test_a_config_survives_the_way_through_json(trained):
    config = read_config(trained)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        RunError, match=r"there is no run .*nowhere; train one with `psd train-head"
    ):
        load_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is no run folder \(it has no config.json\)"):
        load_run(tmp_path)


def test_a_run_without_a_head_is_named(copy):
    (copy / "head.safetensors").unlink()
    with pytest.raises(RunError, match=r"has finished, but its head.safetensors is not there"):
        load_run(copy)
    (copy / "result.json").unlink()
    with pytest.raises(RunError, match=r"has no head.safetensors yet; continue it"):
        load_run(copy)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": 2}', '{"format": 1}', "[" * 9999]
)
def test_a_config_that_is_none_is_refused(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config.json is damaged \(.*\); train again") as caught:
        load_run(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["features"].update(fingerprint="0" * 12),
        lambda values: values["features"]["recipe"].update(timestep="fifty"),
        lambda values: values["head"].update(width="wide"),
        lambda values: values["head"].update(levels=3),
        lambda values: values["samples"].pop("val"),
        lambda values: values["model"].pop("sha256"),
        lambda values: values["dataset"].update(scheme={}),
    ],
)
def test_a_config_with_a_wrong_field_is_refused(copy, change):
    edit(copy, change)
    with pytest.raises(RunError, match=r"config.json is damaged"):
        load_run(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.update(width=16), r"does not fit its config: \w+.*shape"),
        (
            lambda head: head.update(num_outputs=3),
            r"classify.weight has shape \(2, 2, 3, 3\).*expected \(3, 2, 3, 3\)",
        ),
        (lambda head: head["levels"].pop(), r"does not fit its config: feature_mean has shape"),
        (lambda head: head.update(width=7), r"describes no head: .*multiple of 4"),
    ],
)
def test_a_head_that_does_not_fit_its_config_is_refused(copy, change, message):
    edit(copy, lambda values: change(values["head"]))
    with pytest.raises(RunError, match=message):
        load_run(copy)


def test_a_damaged_head_file_is_refused(copy):
    file = copy / "head.safetensors"
    content = file.read_bytes()
    for damaged in (b"", b"version https://git-lfs", content[:-100]):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match=r"head.safetensors is damaged"):
            load_run(copy)


def test_a_head_with_a_tensor_too_few_or_not_finite_is_refused(copy):
    file = copy / "head.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "up_1.bias"}, file)
    with pytest.raises(RunError, match=r"tensor up_1.bias is missing or surplus"):
        load_run(copy)
    save_file({**tensors, "up_1.bias": torch.full_like(tensors["up_1.bias"], torch.nan)}, file)
    with pytest.raises(RunError, match=r"up_1.bias holds values that are not finite"):
        load_run(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.update(width=1 << 40),
        lambda head: head.update(num_outputs=1 << 40),
        lambda head: head["levels"][0]["taps"][0].__setitem__(1, 1 << 40),
    ],
)
def test_a_head_that_is_larger_than_its_file_is_never_made(copy, change, monkeypatch):
    monkeypatch.setattr("pathsegdiff.segmentation.runs.FCNHead", None)
    edit(copy, lambda values: change(values["head"]))
    with pytest.raises(RunError, match=r"does not fit its config, which describes a head of \d+"):
        load_run(copy)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_head_with_a_value_that_is_not_finite_is_named(copy, value):
    file = copy / "head.safetensors"
    tensors = load_file(file)
    tensors["project.weight"].view(-1)[3] = value
    save_file(tensors, file)
    with pytest.raises(RunError, match=r"project.weight holds values that are not finite"):
        load_run(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["head"].update(width=float("inf")),
        lambda values: values.update(class_pixels=[float("inf")]),
        lambda values: values.update(class_weights=[10**400]),
        lambda values: values["dataset"].update(title="a\x1b[2J"),
        lambda values: values["model"].update(name="two\nlines"),
    ],
)
def test_a_config_with_what_cannot_be_is_one_line(copy, change):
    edit(copy, change)
    with pytest.raises(RunError, match=r"config.json is damaged") as error:
        load_run(copy)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("length", [1 << 60, 10_000_000, 3])
def test_a_head_file_whose_header_cannot_be_is_damaged(copy, length):
    file = copy / "head.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(RunError, match=r"head.safetensors is damaged"):
        load_run(copy)


def test_a_store_with_more_samples_of_the_same_recipe_fits(trained, tmp_path):
    check_fits(load_run(trained), build_store(tmp_path / "longer.zarr", train=6, test=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep": 100}, r"with timestep 50, .* has 100; use the store that it was trained on"),
        ({"model_sha256": "c" * 64}, r"with model_sha256 aaaaaaaaaaaa, .* has cccccccccccc"),
        (
            {"dtype": "float32", "conditioning": "none"},
            r"conditioning encoder, .* none \(and dtype\)",
        ),
        ({"tap_specs": TAPS[:7]}, r"with taps middle,up_00.* has middle,up_00"),
        ({"scheme": TISSUE}, r"trained on other classes"),
    ],
)
def test_a_store_of_another_recipe_is_refused(trained, tmp_path, settings, message):
    other = build_store(tmp_path / "other.zarr", train=1, test=1, **settings)
    with pytest.raises(RunError, match=message):
        check_fits(load_run(trained), other)


def test_the_newest_run_is_the_one_whose_head_was_written_last(trained, tmp_path):
    with pytest.raises(RunError, match=r"no trained run under .*psd train-head"):
        newest_run(tmp_path)
    for age, name in enumerate(("c", "a", "b")):
        shutil.copytree(trained, tmp_path / name)
        then = time.time() - 100 * age
        os.utime(tmp_path / name / "head.safetensors", (then, then))
    (tmp_path / "no-run").mkdir()
    assert newest_run(tmp_path) == tmp_path / "c"


def test_the_newest_complete_store_is_found(tmp_path):
    with pytest.raises(
        RunError, match=r"no complete feature store under .*make one with `psd extract`"
    ):
        newest_store(tmp_path)
    with open_writer(tmp_path / "unfinished.zarr") as writer:
        writer.register(make_samples(1, 0))
    with pytest.raises(RunError, match=r"finish .*unfinished.zarr with `psd extract`"):
        newest_store(tmp_path)
    for age, name in enumerate(("b.zarr", "a.zarr")):
        build_store(tmp_path / name, train=1, test=0)
        then = time.time() - 100 * age
        os.utime(tmp_path / name / "marks", (then, then))
    (tmp_path / "junk.zarr").mkdir()
    (tmp_path / "junk.zarr" / "zarr.json").write_text("{}")
    assert newest_store(tmp_path) == tmp_path / "b.zarr"
