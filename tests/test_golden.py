"""The numbers of the authors' own code, tensor by tensor (tests/golden says how they were made)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pathsegdiff.config import ALL_TAPS
from pathsegdiff.device import computing_on
from pathsegdiff.diffusion.checkpoints import import_bundle

GOLDEN = Path(__file__).parent / "golden"
CASES = ("vq_f4", "kl_f8")


def assert_agree(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    """The agreement that the project promises for every tensor."""
    assert ours.shape == theirs.shape, name
    assert ours.dtype == np.float32, name
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b), name
    assert np.abs(a - b).max() < 1e-4 * np.abs(b).max(), name


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = GOLDEN / request.param
    report = import_bundle(
        ldm=folder / "ldm.ckpt",
        project=folder / "project.yaml",
        encoder=folder / "vit256.pth",
        encoder_config=folder / "encoder.json",
        out=tmp_path_factory.mktemp("golden") / request.param,
    )
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    return report, expected, int((folder / "TIMESTEP").read_text())


@pytest.fixture
def two_threads():
    """As the authors' code was run; a GroupNorm over 256 x 256 depends on it by 1e-5."""
    with computing_on(2):
        yield


def test_the_import_leaves_nothing_out(case):
    report, _, _ = case
    assert report.ignored == {"buffers": 4, "inception.": 1, "model_ema.": 2}
    assert report.bundle.card.num_channels == 544


@pytest.mark.usefixtures("two_threads")
def test_the_public_interface_agrees_with_the_authors_code(case):
    report, expected, timestep = case
    model = report.bundle.load()
    images = torch.from_numpy(expected["image"]).permute(0, 3, 1, 2).float() / 255
    embedding = model.embed(images)
    latent = model.latent(images)
    x_t = model.add_noise(latent, torch.from_numpy(expected["noise"]), timestep)
    contexts = {"cond": model.context(embedding, 1), "uncond": model.context(None, 1)}
    ours = {
        "embedding": embedding,
        "z0": latent,
        "zt": x_t,
        "context": contexts["cond"],
        "context_uncond": contexts["uncond"],
        "eps_pred": model.predict_noise(x_t, timestep, contexts["cond"]),
    }
    for name, context in contexts.items():
        taps = model.taps(x_t, timestep, context, ALL_TAPS)
        ours |= {f"{name}/{tap}": value for tap, value in taps.items()}
    assert set(ours) == set(expected) - {"image", "noise"}
    for name, value in ours.items():
        assert_agree(value.numpy(), expected[name], name)


def test_a_batch_gives_what_its_patches_give(case):
    report, expected, timestep = case
    model = report.bundle.load()
    image = torch.from_numpy(expected["image"]).permute(0, 3, 1, 2).float() / 255
    images = torch.cat([image, image.flip(-1)])
    context = model.context(model.embed(images), 2)
    together = model.taps(model.latent(images), timestep, context, ["up_05"])["up_05"]
    for i in range(2):
        alone = model.taps(model.latent(images[i : i + 1]), timestep, context[i : i + 1], ["up_05"])
        assert (alone["up_05"] - together[i : i + 1]).norm() < 1e-3 * together[i].norm()
