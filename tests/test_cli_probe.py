"""``psd probe``."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cli.main import psd, run
from pathsegdiff.config import ALL_TAPS
from pathsegdiff.diffusion.bundle import init_bundle, load_bundle
from pathsegdiff.diffusion.noise import patch_noise
from tests.test_golden import assert_agree

GOLDEN = Path(__file__).parent / "golden"
KEYS = ["embedding", "context", "latent", "noised_latent", *ALL_TAPS]


def _run(*arguments):
    return CliRunner().invoke(psd, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    return init_bundle("micro", 0, tmp_path_factory.mktemp("bundle") / "micro").path


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "patch.png")
    return tmp_path / "patch.png"


@pytest.fixture
def one_thread(monkeypatch):
    """Two threads on cores that others use wait for each other; only golden numbers need two."""
    monkeypatch.setattr("pathsegdiff.diffusion.probe._THREADS", 1)


def _arrays(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("case", ["vq_f4", "kl_f8"])
def test_import_and_probe_give_the_numbers_of_the_authors_code(case, tmp_path):
    folder = GOLDEN / case
    expected = _arrays(folder / "expected.npz")
    Image.fromarray(expected["image"][0]).save(tmp_path / "patch.png")
    np.save(tmp_path / "noise.npy", expected["noise"])
    result = _run(
        *("models", "import", "--ldm", folder / "ldm.ckpt", "--config", folder / "project.yaml"),
        *("--encoder", folder / "vit256.pth", "--encoder-config", folder / "encoder.json"),
        *("--out", tmp_path / "bundle"),
    )
    assert result.exit_code == 0, result.output
    for cond, prefix in (("encoder", "cond"), ("none", "uncond")):
        out = tmp_path / f"{cond}.npz"
        result = _run(
            *("probe", "--model", tmp_path / "bundle", "--image", tmp_path / "patch.png"),
            *("--t", (folder / "TIMESTEP").read_text().strip(), "--cond", cond),
            *("--noise", tmp_path / "noise.npy", "--out", out, "--full"),
        )
        assert result.exit_code == 0, result.output
        arrays = _arrays(out)
        for name in ALL_TAPS:
            assert_agree(arrays[name], expected[f"{prefix}/{name}"], name)
        assert_agree(arrays["latent"], expected["z0"], "latent")
        assert_agree(arrays["noised_latent"], expected["zt"], "noised_latent")
        assert_agree(arrays["embedding"], expected["embedding"], "embedding")
        context = "context" if cond == "encoder" else "context_uncond"
        assert_agree(arrays["context"], expected[context], "context")
        other = (
            ("context_null", "context_uncond")
            if cond == "encoder"
            else ("context_encoder", "context")
        )
        assert_agree(arrays[other[0]], expected[other[1]], other[0])
    assert_agree(_arrays(tmp_path / "encoder.npz")["eps_pred"], expected["eps_pred"], "eps_pred")


@pytest.mark.usefixtures("one_thread")
def test_the_file_holds_every_number_in_float32(micro, image, tmp_path):
    result = _run("probe", "--model", micro, "--image", image, "--out", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    arrays = _arrays(tmp_path / "out.npz")
    assert list(arrays) == KEYS
    assert {arrays[name].dtype for name in KEYS} == {np.dtype("float32")}
    assert {len(arrays[name]) for name in KEYS} == {1}
    taps = load_bundle(micro).card.taps
    for tap in taps:
        assert arrays[tap.name].shape == (1, tap.channels, 256 // tap.stride, 256 // tap.stride)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("cond", "other"), [("encoder", "context_null"), ("none", "context_encoder")]
)
def test_full_adds_the_prediction_and_the_other_context(micro, image, tmp_path, cond, other):
    out = tmp_path / "out.npz"
    _run("probe", "--model", micro, "--image", image, "--cond", cond, "--full", "--out", out)
    arrays = _arrays(out)
    assert list(arrays) == [*KEYS, "eps_pred", other]
    assert not np.allclose(arrays["context"], arrays[other])


@pytest.mark.usefixtures("one_thread")
def test_without_noise_it_is_drawn_for_the_images_name(micro, image, tmp_path):
    shape = load_bundle(micro).card.latent_shape
    np.save(tmp_path / "noise.npy", patch_noise(0, "patch", 0, 0, shape))
    base = ("probe", "--model", micro, "--image", image)
    _run(*base, "--out", tmp_path / "a.npz")
    _run(*base, "--noise", tmp_path / "noise.npy", "--out", tmp_path / "b.npz")
    a, b = _arrays(tmp_path / "a.npz"), _arrays(tmp_path / "b.npz")
    assert all(np.array_equal(a[name], b[name]) for name in KEYS)


def _probe(micro, image, tmp_path, *more):
    arguments = ["probe", "--model", micro, "--image", image, "--out", tmp_path / "x.npz", *more]
    return run([str(argument) for argument in arguments])


def _last_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("Error") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_time_outside_the_schedule_names_the_range(micro, image, tmp_path, capsys, timestep):
    assert _probe(micro, image, tmp_path, "--t", timestep) == 1
    assert "t must be in [0, 999] for model micro" in _last_line(capsys)
    assert not (tmp_path / "x.npz").exists()


def test_another_size_of_image_is_said(micro, tmp_path, capsys):
    Image.new("RGB", (300, 256)).save(tmp_path / "wide.png")
    assert _probe(micro, tmp_path / "wide.png", tmp_path) == 1
    assert "a patch has 256 x 256 pixels, the image 256 x 300" in _last_line(capsys)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (np.zeros((1, 4, 64, 64), np.float32), "noise has shape (1, 4, 64, 64), this model's lat"),
        (np.zeros((3, 32, 32), np.float32), "noise has shape (3, 32, 32)"),
        (np.full((3, 64, 64), np.nan, np.float32), "must hold finite numbers"),
        (np.full((3, 64, 64), "a"), "must hold finite numbers"),
        (np.array([{}], dtype=object), "is not an NPY file of numbers"),
        (b"no npy", "is not an NPY file of numbers"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4',", "is not an NPY file of numbers"),
        (None, "does not exist"),
    ],
)
def test_noise_that_does_not_fit_is_one_line(micro, image, tmp_path, capsys, noise, message):
    file = tmp_path / "noise.npy"
    if isinstance(noise, bytes):
        file.write_bytes(noise)
    elif noise is not None:
        np.save(file, noise, allow_pickle=True)
    assert _probe(micro, image, tmp_path, "--noise", file) == 1
    assert message in _last_line(capsys)


def test_noise_that_claims_more_than_the_file_holds_is_one_line(micro, image, tmp_path, capsys):
    np.save(tmp_path / "noise.npy", np.zeros((3, 64, 64), np.float32))
    data = (tmp_path / "noise.npy").read_bytes()
    (tmp_path / "noise.npy").write_bytes(
        data.replace(b"(3, 64, 64), }     ", b"(3, 64, 999999), } ")
    )
    assert _probe(micro, image, tmp_path, "--noise", tmp_path / "noise.npy") == 1
    assert "is not an NPY file of numbers" in _last_line(capsys)


def test_help_shows_an_example():
    assert "Example:" in _run("probe", "--help").output
