"""Two runs on the same images: the difference, its interval, and what cannot be compared."""

import csv
import json
import re

import numpy as np
import pytest

from cli.main import run
from pathsegdiff.errors import RunError
from pathsegdiff.evaluation.compare import compare, join, read_scored, sum_runs
from pathsegdiff.evaluation.confusion import confusion_matrix
from pathsegdiff.evaluation.intervals import pixel_intervals
from pathsegdiff.evaluation.report import image_row, metrics_json

NAMES = ("background", "gland")
RNG = np.random.default_rng(0)
TARGETS = RNG.integers(0, 3, (12, 20, 20))  # 2: don't care


def predicted(share, seed):
    """The target with a share of its pixels drawn at random."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(TARGETS.shape) < share
    return np.where(wrong, rng.integers(0, 2, TARGETS.shape), TARGETS.clip(max=1))


def write_eval(
    folder,
    labels,
    *,
    names=NAMES,
    ids=None,
    units=None,
    part="test",
    targets=TARGETS,
    patients=None,
):
    confusions = np.stack([confusion_matrix(t, p, 2) for t, p in zip(targets, labels, strict=True)])
    ids = [f"s{number}" for number in range(len(labels))] if ids is None else ids
    patients = ids if patients is None else patients
    rows = [
        image_row(name, c, names, group=patient)
        for name, c, patient in zip(ids, confusions, patients, strict=True)
    ]
    metrics_json(
        folder / f"eval-{part}" / "metrics.json",
        names=names,
        confusions=confusions,
        intervals=pixel_intervals(confusions, groups=units),
        images=rows,
        units=units,
        provenance={"split": part},
    )
    return folder


@pytest.fixture
def better(tmp_path):
    return write_eval(tmp_path / "better", predicted(0.2, 1))


@pytest.fixture
def worse(tmp_path):
    return write_eval(tmp_path / "worse", predicted(0.5, 2))


def test_of_a_held_out_fold_whole_groups_are_drawn(tmp_path):
    patients = [f"p{number // 4}" for number in range(12)]
    labels = [predicted(0.2, 1), predicted(0.5, 2)]
    of_fold, of_split = (
        [
            read_scored(write_eval(tmp_path / f"{part}{k}", one, part=part, patients=patients))
            for k, one in enumerate(labels)
        ]
        for part in ("fold0", "test")
    )
    assert of_fold[0].units == tuple(patients) and of_fold[0].drawn == "groups (patients, cases)"
    assert of_split[0].units == of_split[0].sample_ids and of_split[0].drawn == "images"
    drawn, by_image = (compare(*pair).differences["miou"] for pair in (of_fold, of_split))
    assert drawn.value == by_image.value
    assert (drawn.low, drawn.high) != (by_image.low, by_image.high)
    # One group alone has no chance in it: its images are drawn.
    alone = read_scored(
        write_eval(tmp_path / "alone", labels[0], part="fold1", patients=["p"] * 12)
    )
    assert alone.groups is None and alone.drawn == "images"


def test_folds_are_joined_to_one_evaluation(better, worse, tmp_path):
    labels = predicted(0.2, 1)
    halves = [
        write_eval(
            tmp_path / f"fold{number}", labels[part], part=f"fold{number}", targets=TARGETS[part],
            ids=[f"s{k}" for k in range(12)[part]],
        )
        for number, part in enumerate((slice(0, 5), slice(5, 12)))
    ]  # fmt: skip
    joined = join([read_scored(half) for half in halves])
    assert joined.part == "fold0+fold1" and len(joined.sample_ids) == 12
    whole = read_scored(better)
    assert (
        compare(joined, read_scored(worse)).differences
        == compare(whole, read_scored(worse)).differences
    )
    with pytest.raises(RunError, match="have an image in common"):
        join([whole, read_scored(halves[0])])
    other = write_eval(tmp_path / "other", labels, names=("a", "b"))
    with pytest.raises(RunError, match="the classes of .* differ"):
        join([whole, read_scored(other)])


def test_seeds_are_counted_together(better, worse, tmp_path):
    order = RNG.permutation(12)
    again = write_eval(
        tmp_path / "again", predicted(0.3, 4)[order], ids=[f"s{k}" for k in order],
        targets=TARGETS[order],
    )  # fmt: skip
    one, other, second = (read_scored(path) for path in (better, again, worse))
    both = sum_runs([one, other])
    assert both.sample_ids == one.sample_ids
    assert np.array_equal(both.confusions[order], one.confusions[order] + other.confusions)
    np.testing.assert_allclose(both.miou[order], (one.miou[order] + other.miou) / 2)
    alone = [compare(run, second).differences["miou"].value for run in (one, other)]
    together = compare(both, sum_runs([second, second])).differences["miou"]
    assert min(alone) < together.value < max(alone)
    # a row of itself twice says no more than once
    twice = compare(sum_runs([one, one]), sum_runs([second, second])).differences["miou"]
    once = compare(one, second).differences["miou"]
    assert (twice.value, twice.low, twice.high) == pytest.approx((once.value, once.low, once.high))
    fewer = write_eval(tmp_path / "fewer", predicted(0.2, 1)[:6], targets=TARGETS[:6])
    with pytest.raises(RunError, match="not of the same images"):
        sum_runs([one, read_scored(fewer)])


def test_a_clear_difference_is_one_and_none_is_none(better, worse, tmp_path):
    found = compare(read_scored(better), read_scored(worse))
    first, second = (json.loads((run / "eval-test/metrics.json").read_text()) for run in
                     (better, worse))  # fmt: skip
    difference = found.differences["miou"]
    assert difference.value == pytest.approx(first["miou"] - second["miou"])
    assert 0 < difference.low < difference.value < difference.high
    assert found.values["miou"] == pytest.approx((first["miou"], second["miou"]))
    per_class = [c["iou"] for c in first["per_class"]]
    assert [v[0] for v in found.class_values.values()] == pytest.approx(per_class)
    assert set(found.class_iou) == set(NAMES)
    assert len(found.images) == 12
    assert found.images[0][1] == max(value for _, value in found.images)
    same = compare(read_scored(better), read_scored(better)).differences["miou"]
    assert same.value == same.low == same.high == 0


def test_a_class_that_is_nowhere_does_not_differ(tmp_path, capsys):
    names = ("background", "gland", "rare")
    for run_name, seed in (("a", 1), ("b", 2)):
        confusions = np.stack(
            [
                np.pad(confusion_matrix(t, p, 2), (0, 1))
                for t, p in zip(TARGETS, predicted(0.3, seed), strict=True)
            ]
        )
        rows = [image_row(f"s{n}", c, names) for n, c in enumerate(confusions)]
        metrics_json(
            tmp_path / run_name / "metrics.json",
            names=names,
            confusions=confusions,
            intervals=pixel_intervals(confusions),
            images=rows,
            provenance={"split": "test"},
        )
    assert run(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "IoU rare" in line)
    assert "nan" in line
    assert "differs" not in line


def test_images_are_matched_by_name_whatever_their_order(better, worse, tmp_path):
    labels = predicted(0.5, 2)
    ids = [f"s{number}" for number in range(12)]
    turned = write_eval(tmp_path / "turned", labels[::-1], ids=ids[::-1], targets=TARGETS[::-1])
    expected = compare(read_scored(better), read_scored(worse))
    assert compare(read_scored(better), read_scored(turned)) == expected


def test_sources_are_drawn_as_a_whole(tmp_path):
    units = [f"slide{number // 6}" for number in range(12)]
    first = read_scored(write_eval(tmp_path / "a", predicted(0.2, 1), units=units))
    second = read_scored(write_eval(tmp_path / "b", predicted(0.5, 2), units=units))
    assert first.units == tuple(units)
    found = compare(first, second).differences["miou"]
    # Two sources: every draw is one of them twice, or both.
    halves = []
    for part in (slice(0, 6), slice(6, 12)):
        a, b = (s.confusions[part].sum(axis=0) for s in (first, second))
        halves.append(np.mean(np.diag(a) / (a.sum(0) + a.sum(1) - np.diag(a)))
                      - np.mean(np.diag(b) / (b.sum(0) + b.sum(1) - np.diag(b))))  # fmt: skip
    assert (found.low, found.high) == pytest.approx((min(halves), max(halves)))


def test_what_cannot_be_compared_is_refused(better, worse, tmp_path):
    few = write_eval(tmp_path / "few", predicted(0.2, 1)[:5], targets=TARGETS[:5])
    with pytest.raises(RunError, match=r"not of the same images: s10 is in one .* \(7 are\)"):
        compare(read_scored(better), read_scored(few))
    named = write_eval(tmp_path / "named", predicted(0.2, 1), names=("background", "tumor"))
    with pytest.raises(RunError, match="the classes differ: background, gland in"):
        compare(read_scored(better), read_scored(named))
    other = write_eval(tmp_path / "other", predicted(0.2, 1), targets=1 - TARGETS.clip(max=1))
    with pytest.raises(RunError, match="were scored against different labels"):
        compare(read_scored(better), read_scored(other))
    with pytest.raises(RunError, match="has no evaluation of val; make one with `psd eval"):
        read_scored(better, "val")
    write_eval(better, predicted(0.2, 1), part="val")
    with pytest.raises(RunError, match=r"several evaluations \(test, val\); choose one with --sp"):
        read_scored(better)
    assert read_scored(better, "val").part == "val"


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"images": []}', "[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "metrics.json"
    file.write_text(content)
    with pytest.raises(RunError, match=r"metrics.json is damaged \("):
        read_scored(file)


def test_an_older_file_is_told_from_a_damaged_one(better):
    file = better / "eval-test" / "metrics.json"
    document = json.loads(file.read_text())
    for image in document["images"]:
        del image["confusion"]
    file.write_text(json.dumps(document))
    with pytest.raises(RunError, match="older version; score the run again"):
        read_scored(better)


def test_a_comparison_is_a_page_with_a_picture(better, worse, tmp_path, capsys):
    out = tmp_path / "compared"
    (better / "eval-test" / "report.html").write_text("<html>")
    assert run(["compare", str(better), str(worse), "--draws", "200", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"report: {out / 'report.html'}\n")
    table = (out / "table.md").read_text()
    found = compare(read_scored(better), read_scored(worse), draws=200).differences["miou"]
    first, second = compare(read_scored(better), read_scored(worse)).values["miou"]
    assert (
        f"| mIoU | {first:.4f} | {second:.4f} | {found.value:+.4f} | "
        f"{found.low:+.4f} to {found.high:+.4f} | yes |\n"
    ) in table
    assert "mIoU is higher in the first on 12 of 12 images" in table
    with (out / "table.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == len(table.split("\n\n")[1].splitlines()) - 1
    page = (out / "report.html").read_text()
    (link,) = re.findall('href="([^"]+)"', page)
    assert (out / link).resolve() == (better / "eval-test" / "report.html").resolve()
    assert (out / "plot.png").stat().st_size > 3000


def test_the_runs_of_all_folds_are_compared_as_one(tmp_path, capsys):
    sides = {}
    for side, error in (("a", 0.2), ("b", 0.4)):
        labels = predicted(error, 1)
        for fold, part in enumerate((slice(0, 5), slice(5, 12))):
            ids = [f"s{number}" for number in range(12)][part]
            write_eval(tmp_path / f"{side}{fold}", labels[part], ids=ids, targets=TARGETS[part])
        sides[side] = write_eval(tmp_path / side, labels)
    whole = compare(read_scored(sides["a"]), read_scored(sides["b"])).differences["miou"]
    folds = [",".join(str(tmp_path / f"{side}{fold}") for fold in (0, 1)) for side in "ab"]
    assert run(["compare", *folds]) == 0
    said = capsys.readouterr().out
    assert "test+test, 12 images" in said
    assert f"= {whole.value:+.4f}  ({whole.low:+.4f} to {whole.high:+.4f})" in said


def test_the_command_says_what_differs(better, worse, capsys):
    assert run(["compare", str(better), str(worse), "--draws", "200"]) == 0
    said = capsys.readouterr().out
    assert "test, 12 images, 95 % intervals over images: " in said
    assert said.count("  differs") == 6
    assert "mIoU is higher in the first on 12 of 12 images" in said
    assert run(["compare", str(better), str(better)]) == 0
    assert "differs" not in capsys.readouterr().out
    assert run(["compare", str(better), str(better / "none")]) == 1
