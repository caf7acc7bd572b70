import csv
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from pathsegdiff.data.image import read_label_image
from pathsegdiff.errors import RunError, StoreError
from pathsegdiff.features.store import FeatureStore
from pathsegdiff.segmentation import scoring
from pathsegdiff.segmentation.evaluate import evaluate_run
from pathsegdiff.segmentation.runs import load_run
from pathsegdiff.segmentation.scoring import (
    Prediction,
    _choose_objects,
    _ObjectRule,
    _score_objects,
    object_mask,
)
from tests.helpers_head import train_small
from tests.helpers_store import (
    GLANDS,
    TISSUE,
    build_store,
    make_arrays,
    make_label,
    make_samples,
    open_writer,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("eval") / "shapes.zarr", train=6, test=3)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "run"
    train_small(store, out, steps=25, learning_rate=2e-2)
    return out


@pytest.fixture(scope="module")
def evaluated(store, trained):
    seen = []
    found = evaluate_run(load_run(trained), store, progress=lambda *state: seen.append(state))
    return found, seen


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    """Three classes and a don't-care strip; a store and a run."""
    folder = tmp_path_factory.mktemp("tissue")
    store = build_store(folder / "tissue.zarr", train=4, test=3, scheme=TISSUE)
    train_small(store, folder / "run", val="0")
    return store, load_run(folder / "run")


def plain_labels(run, store, sample):
    """Prediction of the plain head on the dense map, without the don't-care output."""
    f = torch.from_numpy(store.dense(sample))[None]
    with torch.no_grad():
        logits = run.head.forward_dense(f)
    return logits[0, : run.num_classes].argmax(dim=0).numpy()


def test_pixel_metrics_are_those_of_the_plain_head_counted_plainly(tissue):
    store, run = tissue
    found = evaluate_run(run, store)
    confusion = np.zeros((3, 3), np.int64)
    for sample in store.samples("test"):
        label, predicted = store.label(sample), plain_labels(run, store, sample)
        for target in range(3):
            for guess in range(3):
                confusion[target, guess] += int(((label == target) & (predicted == guess)).sum())
    # Folded and plain form may disagree where two logits are equal up to rounding.
    assert np.abs(np.array(found.scores.confusion) - confusion).sum() <= 4
    assert confusion.sum() == 3 * 64 * 56  # without the don't-care strip
    metrics = json.loads((found.path / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum(), abs=1e-3)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    assert metrics["miou"] == pytest.approx((np.diag(confusion) / union).mean(), abs=1e-3)
    assert metrics["dice"] == metrics["f1"]
    assert metrics["objects"] is None
    assert found.min_area_px is None


def test_a_trained_head_finds_the_discs(evaluated):
    found, _ = evaluated
    assert found.scores.miou > 0.7
    low, high = found.intervals["miou"].low, found.intervals["miou"].high
    assert low <= found.scores.miou <= high


def test_an_evaluation_leaves_metrics_rows_overlays_and_a_report(store, trained, evaluated):
    found, _ = evaluated
    assert found.path == trained / "eval-test"
    assert sorted(path.name for path in found.path.iterdir()) == [
        "metrics.json",
        "overlays",
        "per_image.csv",
        "predictions",
        "report.html",
    ]
    names = [sample.sample_id for sample in store.samples("test")]
    labels = [read_label_image(found.path / "predictions" / f"{name}.png") for name in names]
    counted = sum(
        (label == store.label(sample)).sum()
        for label, sample in zip(labels, store.samples("test"), strict=True)
    )
    assert counted / sum(label.size for label in labels) == pytest.approx(found.scores.accuracy)
    assert sorted(path.stem for path in (found.path / "overlays").iterdir()) == names
    with Image.open(found.path / "overlays" / f"{names[0]}.png") as image:
        assert image.mode == "RGB"
    with (found.path / "per_image.csv").open(newline="") as file:
        assert [row["sample_id"] for row in csv.DictReader(file)] == names
    metrics = json.loads((found.path / "metrics.json").read_text())
    for name in ("accuracy", "dice", "miou", "f1"):
        assert metrics[name] == pytest.approx(getattr(found.scores, name))
        assert metrics["intervals"][name]["low"] <= metrics[name]
    assert metrics["objects"]["f1"] == pytest.approx(found.objects.f1)
    provenance = metrics["provenance"]
    assert provenance["features"]["fingerprint"] == store.fingerprint
    assert provenance["settings"]["learning_rate"] == 2e-2
    assert provenance["min_area_px"] == found.min_area_px
    assert provenance["evaluated"]["versions"]["torch"] == torch.__version__
    assert provenance["head"]["kept"]["step"] >= 3


def test_random_weights_are_said_everywhere(evaluated):
    found, _ = evaluated
    assert any(note.startswith("random weights") for note in found.notes)
    assert "random weights" in (found.path / "report.html").read_text()
    assert "random weights" in (found.path / "metrics.json").read_text()


def test_the_report_fetches_nothing(evaluated):
    found, _ = evaluated
    text = (found.path / "report.html").read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "<script" not in text


def test_progress_counts_validation_and_evaluation_together(evaluated):
    _, seen = evaluated
    assert [(done, total) for done, total, _ in seen] == [(n, 5) for n in range(1, 6)]
    assert [note for _, _, note in seen] == ["validation: smallest object"] * 2 + ["test"] * 3


def test_two_evaluations_are_equal(store, trained, evaluated, tmp_path):
    found, _ = evaluated
    again = evaluate_run(load_run(trained), store, out=tmp_path / "again")
    assert again.path == tmp_path / "again"
    assert again.scores == found.scores
    assert (tmp_path / "again" / "per_image.csv").read_text() == (
        found.path / "per_image.csv"
    ).read_text()


def test_objects_are_cut_at_the_source_size_by_the_larger_probability():
    probabilities = torch.zeros(2, 4, 4)
    probabilities[1, :, 2:] = 1.0
    probabilities[0] = 1 - probabilities[1]
    mask = object_mask(probabilities, (2, 8), 1)
    assert mask.shape == (2, 8)
    assert mask.dtype == bool
    assert mask.tolist() == [[False] * 4 + [True] * 4] * 2


def test_contours_part_objects_that_touch(store):
    sample = store.samples("test")[0]
    instances = np.zeros((40, 60), np.int32)
    instances[5:35, 10:30], instances[5:35, 30:50] = 1, 2
    probabilities = torch.from_numpy(np.stack([instances == 0, instances > 0])).float()
    edges = torch.zeros(40, 60)
    edges[:, 28:32] = 1.0

    class Touching:
        def instances(self, sample):
            return instances

    def scored(contours, contour_from=0.5):
        found = Prediction(
            sample=sample,
            target=(instances > 0).astype(np.uint8),
            labels=(instances > 0).astype(np.uint8),
            probabilities=probabilities,
            contours=contours,
        )
        return _score_objects(
            Touching(), store.card, found, _ObjectRule(min_area_px=0, contour_from=contour_from)
        )

    merged, parted = scored(None), scored(edges)
    assert (merged.tp, merged.fp, merged.fn) == (1, 0, 1)
    # Grown back by the disk: a rim of three pixels more, and the cut is closed.
    assert (parted.tp, parted.fp, parted.fn) == (2, 0, 0)
    assert parted.dice > merged.dice
    # Contours that are seen everywhere, as a weighted loss has it, part as well from higher up.
    everywhere = edges.clamp(min=0.6)
    assert (scored(everywhere).tp, scored(everywhere).fn) == (0, 2)
    assert scored(everywhere, 0.7).dice == parted.dice

    class Eager(Touching):
        def predictions(self, samples):
            yield Prediction(
                sample=samples[0],
                target=(instances > 0).astype(np.uint8),
                labels=(instances > 0).astype(np.uint8),
                probabilities=probabilities,
                contours=everywhere,
            )

    rule = _choose_objects(Eager(), store.card, [sample], "test", 0, None)
    assert rule == _ObjectRule(min_area_px=0, contour_from=0.7)


def test_dont_care_is_neither_predicted_nor_scored(tissue):
    store, run = tissue
    head = run.head
    before = head.classify.bias.clone()
    head.classify.bias[3] = 1e6  # don't care would win every pixel
    found = evaluate_run(run, store)
    head.classify.bias.copy_(before)
    assert found.scores.num_classes == 3
    assert found.scores.pixels == 3 * 64 * 56
    assert evaluate_run(run, store).scores == found.scores


def test_without_validation_the_smallest_object_is_chosen_on_training_images(
    store, tmp_path, monkeypatch
):
    train_small(store, tmp_path / "run", val="0", steps=2)
    run = load_run(tmp_path / "run")
    asked, seen = [], []

    def choose(images, **settings):
        asked.append([target for _, target in images])
        return 0, 71

    monkeypatch.setattr(scoring, "choose_objects", choose)
    monkeypatch.setattr(scoring, "_TRAINING_LOOKED_AT", 4)
    found = evaluate_run(run, store, progress=lambda *progress: seen.append(progress))
    assert found.min_area_px == 71
    trained = [s for s in store.samples("train") if s.sample_id in run.config.samples["train"]]
    assert len(trained) == 6
    for target, number in zip(asked[0], (0, 1, 3, 4), strict=True):
        assert np.array_equal(target, store.instances(trained[number]))
    assert any("was chosen on 4 training images" in note for note in found.notes)
    assert [note for _, _, note in seen] == ["training: smallest object"] * 4 + ["test"] * 3
    assert [(done, total) for done, total, _ in seen] == [(n, 7) for n in range(1, 8)]


def test_a_store_of_the_scored_images_alone_keeps_every_object_and_says_so(store, tmp_path):
    train_small(store, tmp_path / "run", val="0", steps=2)
    alone = build_store(tmp_path / "alone.zarr", train=0)
    found = evaluate_run(load_run(tmp_path / "run"), alone)
    assert found.min_area_px == 0
    assert any("every object is kept" in note for note in found.notes)


def test_the_held_out_fold_is_scored_by_default(store, tmp_path):
    train_small(store, tmp_path / "run", fold=1, val="0", steps=2)
    run = load_run(tmp_path / "run")
    found = evaluate_run(run, store)
    assert found.path == tmp_path / "run" / "eval-fold1"
    assert found.sample_unit == "images"  # also where groups are drawn
    rows = json.loads((found.path / "metrics.json").read_text())["images"]
    assert [row["sample_id"] for row in rows] == run.config.samples["held_out"]
    assert not set(run.config.samples["held_out"]) & set(run.config.samples["train"])


def test_images_that_were_trained_on_are_said(store, trained):
    found = evaluate_run(load_run(trained), store, split="train")
    assert found.part == "train"
    assert any("4 of 6 images of train are among those it was trained on" in n for n in found.notes)
    assert any("2 of 6 images of train are among those it was chosen on" in n for n in found.notes)


def test_a_split_without_samples_is_named_with_those_that_have_some(trained, tmp_path):
    store = build_store(tmp_path / "train-only.zarr", train=6, test=0)
    run = load_run(trained)
    with pytest.raises(RunError, match=r"no complete sample of split 'test' \(complete: train\)"):
        evaluate_run(run, store)
    with pytest.raises(RunError, match=r"no complete sample of split 'testC'"):
        evaluate_run(run, store, split="testC")


def test_a_store_without_the_validation_samples_is_refused(trained, tmp_path):
    store = build_store(tmp_path / "test-only.zarr", train=0, test=3)
    with pytest.raises(RunError, match=r"lacks 2 of the samples that .* put aside"):
        evaluate_run(load_run(trained), store)


def test_a_store_of_another_recipe_is_refused_before_anything_is_written(trained, tmp_path):
    other = build_store(tmp_path / "other.zarr", train=6, test=3, timestep=100)
    with pytest.raises(RunError, match=r"timestep 50, .* has 100"):
        evaluate_run(load_run(trained), other, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_sample_is_named(trained, store, tmp_path):
    shutil.copytree(store.path, tmp_path / "damaged.zarr")
    sample = store.samples("test")[0]
    for chunk in (tmp_path / "damaged.zarr" / "stride_8" / "c" / str(sample.index)).rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    damaged = FeatureStore.open(tmp_path / "damaged.zarr")
    with pytest.raises(StoreError, match=rf"sample {sample.sample_id} is damaged"):
        evaluate_run(load_run(trained), damaged, out=tmp_path / "out")


def test_an_unfinished_split_is_said(trained, tmp_path):
    rng = np.random.default_rng(0)
    with open_writer(tmp_path / "part.zarr") as writer:
        samples = writer.register(make_samples(6, 3))
        for sample in samples[:-1]:
            label = make_label(rng, GLANDS, 64)
            from tests.helpers_store import TAPS

            writer.write(sample, make_arrays(rng, label, GLANDS, TAPS, 32))
    found = evaluate_run(
        load_run(trained), FeatureStore.open(tmp_path / "part.zarr"), out=tmp_path / "out"
    )
    assert any("only 2 of the 3 images of test are extracted so far" in n for n in found.notes)


def test_an_unfinished_training_is_said(trained, store, tmp_path):
    unfinished = tmp_path / "run"
    shutil.copytree(trained, unfinished)
    (unfinished / "result.json").unlink()
    found = evaluate_run(load_run(unfinished), store, out=tmp_path / "out")
    assert "the training has not finished: this head is the one kept so far, of " in found.notes[1]
    again = evaluate_run(load_run(trained), store, out=tmp_path / "again")
    assert not any("has not finished" in note for note in again.notes)


def test_the_smallest_object_is_chosen_without_keeping_the_validation_images(store):
    class Watched:
        """Predicts the label, and counts the object maps that are alive."""

        def __init__(self):
            self.given, self.most = [], 0

        def predictions(self, samples):
            for sample in samples:
                label = store.label(sample)
                logits = np.stack([label == 0, label == 1]).astype(np.float32)
                yield Prediction(
                    sample=sample,
                    target=label,
                    labels=label,
                    probabilities=torch.from_numpy(logits),
                )

        def instances(self, sample):
            found = store.instances(sample)
            self.given.append(weakref.ref(found))
            self.most = max(self.most, sum(given() is not None for given in self.given))
            return found

    watched = Watched()
    chosen = _choose_objects(watched, store.card, store.samples(), "test", 0, None)
    assert (chosen.min_area_px, chosen.contour_from) == (0, None)
    assert len(watched.given) == 9
    assert watched.most <= 2
