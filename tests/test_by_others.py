"""Numbers and files held against other packages: torchmetrics, scikit-learn, tensorstore."""

import numpy as np
import pytest
import torch

from pathsegdiff.evaluation.confusion import confusion_matrix, scores
from tests.helpers_store import TISSUE, build_store


def label_maps(number):
    """Pairs of target and prediction, 2 to 6 classes, with don't care in the target."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        num_classes = int(rng.integers(2, 7))
        target = rng.integers(num_classes, size=(24, 24)).astype(np.uint8)
        guess = rng.integers(num_classes, size=target.shape).astype(np.uint8)
        predicted = np.where(rng.random(target.shape) < rng.random(), target, guess)
        target[rng.random(target.shape) < 0.2] = 255
        yield num_classes, target, predicted.astype(np.uint8)


def test_metrics_are_those_of_torchmetrics_and_scikit_learn_on_a_thousand_maps():
    import pathsegdiff.diffusion.third_party  # noqa: F401  (mends torchvision, which follows)

    functional = pytest.importorskip("torchmetrics.functional.classification")
    from sklearn import metrics as sklearn

    for num_classes, target, predicted in label_maps(1000):
        found = scores(confusion_matrix(target, predicted, num_classes))
        pair = torch.from_numpy(predicted).long(), torch.from_numpy(target).long()
        known = {"num_classes": num_classes, "ignore_index": 255}
        expected = {
            "accuracy": functional.multiclass_accuracy(*pair, average="micro", **known),
            "miou": functional.multiclass_jaccard_index(*pair, average="macro", **known),
            "dice": functional.multiclass_f1_score(*pair, average="macro", **known),
        }
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value.item(), abs=1e-6), name
        counted = target < num_classes
        y, p = target[counted], predicted[counted]
        assert found.miou == pytest.approx(sklearn.jaccard_score(y, p, average="macro"))
        assert found.dice == pytest.approx(sklearn.f1_score(y, p, average="macro"))
        assert found.accuracy == pytest.approx(sklearn.accuracy_score(y, p))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "float16-5bit"])
def test_another_reader_of_zarr_finds_the_same_values(tmp_path, dtype):
    tensorstore = pytest.importorskip("tensorstore")
    store = build_store(tmp_path / "s.zarr", train=2, test=1, scheme=TISSUE, dtype=dtype)

    def read(name):
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{tmp_path}/s.zarr/{name}"},
        }
        return tensorstore.open(spec, read=True).result().read().result()

    for sample in store.samples():
        row = sample.index
        for level in store.levels:
            found = np.asarray(read(level)[row]).astype(np.float32)
            if dtype == "int8":
                found = found * np.asarray(read(f"scale_{level}")[row])[:, None, None]
            ours = store.read_level(sample, level).astype(np.float32)
            assert np.array_equal(found, ours), level
        assert np.array_equal(read("label")[row], store.label(sample))
        assert np.array_equal(read("image")[row], store.image(sample))
        assert np.array_equal(read("embedding")[row], store.embedding(sample))
