"""Stage 1 on one region: the paper's features, whatever the batch."""

import numpy as np
import pytest
import torch

from pathsegdiff.device import computing_on
from pathsegdiff.errors import ConfigError
from pathsegdiff.features.stage_one import View, iterate_views
from tests.helpers_stage_one import T50, TOLERANCE, make_bundle, make_stage_one


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "micro")


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def wide():
    """Eight patches: no batch of 8 is cut short."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (512, 1024, 3), dtype=np.uint8)


def run(stage_one, image, views=None):
    return stage_one.run(stage_one.prepare(image, "sample"), views)


@pytest.fixture(scope="module")
def plain(bundle, wide):
    """Noise and everything that is kept of a region of eight patches: batches of 3, one thread."""
    return numbers(bundle, wide, 3, 1)


def numbers(bundle, image, batch_size, threads):
    """Noise and everything that stage 1 makes of a region."""
    with computing_on(threads):
        stage_one = make_stage_one(bundle, batch_size=batch_size, dtype="float32", tokens=True)
        region = stage_one.prepare(image, "sample")
        found = stage_one.run(region)
    kept = {**found.levels[T50], "tokens": found.tokens, "embedding": found.embedding}
    return region.noise.numpy(), kept


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_and_threads_change_no_noise_and_features_by_rounding_only(
    bundle, wide, plain, batch_size, threads
):
    noise, kept = numbers(bundle, wide, batch_size, threads)
    assert noise.tobytes() == plain[0].tobytes()
    assert set(kept) == {"stride_4", "stride_8", "stride_16", "stride_32", "tokens", "embedding"}
    for name, values in kept.items():
        scale = np.abs(plain[1][name]).max()
        np.testing.assert_allclose(values, plain[1][name], rtol=0, atol=TOLERANCE * scale)
        if (batch_size, threads) == (3, 1):
            assert values.tobytes() == plain[1][name].tobytes()


def test_two_threads_give_the_same_bits_each_time(bundle, image):
    first, second = (numbers(bundle, image, 3, 2) for _ in range(2))
    for name, values in first[1].items():
        assert values.tobytes() == second[1][name].tobytes()


def test_the_same_call_gives_the_same_bits(bundle, image):
    stage_one = make_stage_one(bundle)
    first, second = run(stage_one, image).levels[T50], run(stage_one, image).levels[T50]
    for name in first:
        assert first[name].tobytes() == second[name].tobytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_features_of_the_cpu_whatever_is_still_being_copied(bundle, image):
    settings = {"dtype": "float32", "tokens": True}
    here = run(make_stage_one(bundle, **settings), image)
    device = torch.device("cuda")
    stage_one = make_stage_one(bundle, device=device, **settings)
    other = np.flip(image, 0).copy()
    first, second, third = (run(stage_one, pixels) for pixels in (image, other, image))
    for there in (third, first):
        for name, values in here.levels[T50].items():
            error = np.abs(there.levels[T50][name] - values).max() / np.abs(values).max()
            assert error < 1e-2  # convolutions in TF32
        np.testing.assert_allclose(there.embedding, here.embedding, atol=0.05)
        assert there.tokens.shape == here.tokens.shape
    assert first.levels[T50]["stride_4"].tobytes() == third.levels[T50]["stride_4"].tobytes()
    assert not np.array_equal(first.levels[T50]["stride_4"], second.levels[T50]["stride_4"])


def test_noise_depends_on_the_place_and_the_sample_and_not_on_the_batch(bundle, image):
    stage_one = make_stage_one(bundle)
    noise = stage_one.prepare(image, "a").noise
    assert torch.equal(noise, make_stage_one(bundle, batch_size=1).prepare(image, "a").noise)
    assert not torch.equal(noise, stage_one.prepare(image, "b").noise)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, make_stage_one(bundle, seed=1).prepare(image, "a").noise)


def test_several_views_are_what_each_gives_alone(bundle, image):
    views = tuple(iterate_views([50, 200], ["encoder", "none"]))
    together = run(make_stage_one(bundle, views=views), image)
    assert len(together.levels) == 4
    for view in views:
        alone = run(make_stage_one(bundle, views=[view]), image).levels[view]
        for name, features in alone.items():
            assert features.tobytes() == together.levels[view][name].tobytes()
    null, conditioned = (
        together.levels[View(timestep=50, conditioning=c)]["stride_32"] for c in ("none", "encoder")
    )
    assert not np.array_equal(null, conditioned)


def test_some_taps_are_what_all_taps_give(bundle, image):
    every = run(make_stage_one(bundle), image).levels[T50]
    stage_one = make_stage_one(bundle, taps=["up_09", "up_03"])
    some = run(stage_one, image).levels[T50]
    assert set(some) == {"stride_4", "stride_16"}
    level = next(level for level in make_stage_one(bundle).levels if level.name == "stride_4")
    tap = next(tap for tap in level.taps if tap.name == "up_09")
    assert some["stride_4"].tobytes() == every["stride_4"][tap.start : tap.stop].tobytes()


def test_tokens_are_stored_only_when_asked_for(bundle, image):
    assert run(make_stage_one(bundle), image).tokens is None
    found = run(make_stage_one(bundle, tokens=True), image)
    assert found.tokens is not None
    assert found.tokens.shape == (found.embedding.shape[1], 32, 32)
    np.testing.assert_array_equal(found.embedding, run(make_stage_one(bundle), image).embedding)


def test_reduced_precision_stays_near_float32(bundle, image):
    full = run(make_stage_one(bundle, dtype="float32"), image).levels[T50]
    half = run(make_stage_one(bundle, dtype="float32", precision="bfloat16"), image).levels[T50]
    for name, features in full.items():
        error = np.linalg.norm(half[name] - features) / np.linalg.norm(features)
        assert 0 < error < 0.05


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(bundle, timestep):
    with pytest.raises(ConfigError, match=rf"t must be in \[0, 999\], got {timestep}"):
        make_stage_one(bundle, views=[View(timestep=timestep, conditioning="encoder")])


def test_an_unknown_tap_is_refused(bundle):
    with pytest.raises(ConfigError, match="no tap is called 'up_12'; there are middle, up_00"):
        make_stage_one(bundle, taps=["up_12"])
