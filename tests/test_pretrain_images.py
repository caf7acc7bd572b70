"""Crops of a pool: keyed, in range, of the right scale; what is held out stays out."""

import numpy as np
import pytest
from PIL import Image

from pathsegdiff.diffusion.pretrain.images import (
    SCALE_JITTER,
    ImagePool,
    PoolImage,
    find_images,
    open_pool,
)
from pathsegdiff.errors import DataError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (300, 280, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"image_{number}.png")
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"image_{number}_mask.png")
    return tmp_path


def test_masks_beside_images_are_left_out(folder):
    pool = open_pool([str(folder)])
    names = {image.path.name for image in (*pool.train, *pool.held_out)}
    assert names == {f"image_{number}.png" for number in range(6)}


def test_a_crop_depends_on_seed_stream_and_step_alone(folder):
    first, again = open_pool([str(folder)], seed=3), open_pool([str(folder)], seed=3)
    batch = first.batch(1, 5, 4, 64)
    assert batch.shape == (4, 3, 64, 64)
    first.batch(1, 6, 4, 64)
    assert (first.batch(1, 5, 4, 64) == batch).all()
    assert (again.batch(1, 5, 4, 64) == batch).all()
    assert (first.batch(2, 5, 4, 64) != batch).any()
    assert (first.batch(1, 6, 4, 64) != batch).any()


def test_no_image_of_a_held_out_group_is_trained_on(folder):
    images = [
        PoolImage(
            path=folder / f"image_{n}.png", scale=1.0, group=f"case {n // 2}", size=(300, 280)
        )
        for n in range(6)
    ]
    pool = ImagePool(images)
    held_out = {image.group for image in pool.held_out}
    assert len(held_out) == 1
    assert len(pool.held_out) == 2
    assert not held_out & {image.group for image in pool.train}


def test_one_group_cannot_be_trained_on(folder):
    image = PoolImage(path=folder / "image_0.png", scale=1.0, group="only", size=(300, 280))
    with pytest.raises(DataError, match="two groups at least"):
        ImagePool([image])


def test_a_scale_enlarges_what_a_crop_shows(tmp_path):
    # A ramp of one grey level per pixel: a crop's span tells how many source pixels it holds.
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    for number in range(3):
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / f"{number}.png")
    spans = {}
    for scale in (1, 2):
        crops = open_pool([f"{tmp_path}@{scale}"]).batch(1, 0, 32, 64).numpy()
        along = np.maximum(np.ptp(crops[:, 0], axis=1).max(1), np.ptp(crops[:, 0], axis=2).max(1))
        spans[scale] = along.mean()
    low, high = SCALE_JITTER
    assert 64 / high - 2 <= spans[1] <= 64 / low + 2
    assert spans[1] / spans[2] == pytest.approx(2, rel=0.15)


def test_a_manifest_gives_its_training_images_with_their_cases():
    pool = open_pool(["demo"])
    images = (*pool.train, *pool.held_out)
    assert len(images) == 26
    assert all(image.scale == pytest.approx(512 / 224) for image in images)
    assert len({image.group for image in images}) == 11


def test_a_data_set_comes_before_a_folder_of_its_name(tmp_path, monkeypatch, caplog):
    # As `psd demo` leaves one.
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "demo" / name).mkdir(parents=True)
        Image.new("RGB", (300, 300)).save(tmp_path / "demo" / name / "overlay.png")
    assert len(find_images(["demo"])) == len(find_images(["demo@2"])) == 26
    assert "demo: the data set of that name; the folder is ./demo" in caplog.text
    for folder in ("./demo", "./demo@2", str(tmp_path / "demo")):
        assert len(find_images([folder])) == 2


@pytest.mark.parametrize("source", ["nowhere", "nowhere@2", "@", "no/where/", "tests@abc"])
def test_a_source_that_is_not_there_is_one_line(source):
    with pytest.raises(DataError, match=f"--images {source}: there is no such folder") as error:
        open_pool([source])
    assert "\n" not in str(error.value)


def test_a_scale_outside_reason_is_refused(folder):
    with pytest.raises(DataError, match="between 1/16 and 16"):
        open_pool([f"{folder}@100"])
