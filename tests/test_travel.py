"""What travels comes back: images with order and crops, trainings at their step, no surprises."""

import gzip
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import nn

from pathsegdiff.diffusion.bundle import init_bundle
from pathsegdiff.diffusion.presets import PRESETS
from pathsegdiff.diffusion.pretrain import travel
from pathsegdiff.diffusion.pretrain.images import INDEX_FILE, find_images, open_pool
from pathsegdiff.diffusion.pretrain.loop import LoopSettings, Part, TrainingLoop
from pathsegdiff.diffusion.pretrain.small_state import expand, shrink
from pathsegdiff.errors import BundleError, ConfigError, DataError, RunError

CPU = torch.device("cpu")


# -- images --


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for number in range(9):
        noise = rng.integers(0, 256, (90 + number, 96, 3), dtype=np.uint8)
        image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
        image.save(made / f"image_{8 - number}.png")
    return made


@pytest.fixture(scope="module")
def archive(folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("archive") / "images.tar"
    travel.pack_images(find_images([str(folder)]), made)
    return made


@pytest.fixture
def encoder(tmp_path):
    made = tmp_path / "encoder"
    made.mkdir()
    save_file({"weight": torch.tensor([1 / 3])}, made / "weights.safetensors")
    (made / "facts.json").write_text('{"weights": "ours"}')
    return made


def facts(images):
    return [(image.group, image.scale, image.size) for image in images]


def test_a_pool_of_unpacked_images_holds_out_the_same_and_cuts_the_same_crops(folder, tmp_path):
    sources = [f"{folder}@2.2"]
    size = sum(image.path.stat().st_size for image in find_images(sources))
    packed = travel.pack_images(find_images(sources), tmp_path / "images.tar", max_bytes=size)
    assert packed.count == 9 and packed.quality is not None
    travel.unpack_images(tmp_path / "images.tar", tmp_path / "images")
    for seed in (0, 5):
        here = open_pool(sources, seed=seed)
        there = open_pool([str(tmp_path / "images")], seed=seed)
        assert facts(here.train) == facts(there.train)
        assert facts(here.held_out) == facts(there.held_out)
        difference = here.batch(1, 7, 6, 32).float() - there.batch(1, 7, 6, 32).float()
        assert difference.abs().mean() < 4  # another place or mirror image: above 20


def test_files_that_fit_travel_as_they_are_and_once_for_all_their_scales(folder, tmp_path):
    sources = [f"{folder}@2.2", str(folder)]
    images = find_images(sources)
    packed = travel.pack_images(images, tmp_path / "images.tar")
    assert (packed.count, packed.quality) == (18, None)
    travel.unpack_images(tmp_path / "images.tar", tmp_path / "images")
    files = sorted(p for p in (tmp_path / "images").iterdir() if p.name != INDEX_FILE)
    assert [f.read_bytes() for f in files] == [i.path.read_bytes() for i in images[:9]]
    here, there = open_pool(sources), open_pool([str(tmp_path / "images")])
    assert facts(here.train) == facts(there.train)
    assert torch.equal(here.batch(1, 7, 6, 32), there.batch(1, 7, 6, 32))


def test_the_quality_is_the_highest_that_fits(folder, tmp_path):
    images = find_images([str(folder)])
    archive = tmp_path / "images.tar"
    packed = travel.pack_images(images, archive, max_bytes=12_000)
    assert 0 < packed.quality < 100
    assert packed.bytes == archive.stat().st_size < 12_000
    names = travel._names(images, ".webp")
    more = travel._encode_all(names, packed.quality + 1, 1 << 30)
    index = travel._index(images, names, packed.quality + 1)
    assert travel.write_archive(archive, {INDEX_FILE: index, **more}) >= 12_000


def test_images_that_do_not_fit_are_an_error(folder, tmp_path):
    with pytest.raises(DataError, match="9 images do not fit into 700 bytes at any quality"):
        travel.pack_images(find_images([str(folder)]), tmp_path / "images.tar", max_bytes=700)
    assert not (tmp_path / "images.tar").exists()


def test_a_finished_encoder_goes_along_as_float16(folder, encoder, tmp_path):
    archive = tmp_path / "images.tar"
    travel.pack_images(find_images([str(folder)]), archive, encoder=encoder)
    travel.unpack_images(archive, tmp_path / "images")
    there = tmp_path / "images" / travel.ENCODER_FOLDER
    assert load_file(there / "weights.safetensors")["weight"].item() == np.float16(1 / 3)
    assert json.loads((there / "facts.json").read_text()) == {"weights": "ours"}
    with pytest.raises(RunError, match="no finished part"):
        travel.pack_images(find_images([str(folder)]), archive, encoder=tmp_path)


def test_packed_images_are_not_scaled_again(archive, tmp_path):
    travel.unpack_images(archive, tmp_path / "images")
    with pytest.raises(DataError, match="bring their scales along"):
        open_pool([f"{tmp_path / 'images'}@2"])


@pytest.mark.parametrize(
    "entry", [{"file": "../secret.webp"}, {"file": "/etc/passwd"}, {"scale": "2"}, {"group": 3}]
)
def test_a_hostile_index_is_refused(archive, tmp_path, entry):
    travel.unpack_images(archive, tmp_path / "images")
    index = tmp_path / "images" / INDEX_FILE
    values = json.loads(index.read_text())
    values["images"][2] |= entry
    index.write_text(json.dumps(values))
    with pytest.raises(DataError, match="entry 2 is damaged"):
        open_pool([str(tmp_path / "images")])


def hostile(archive: Path, name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> None:
    with tarfile.open(archive, "w:gz") as made:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, "/etc/passwd", len(data)
        made.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../escaped", tarfile.REGTYPE, "no plain file name"),
        ("a/../../escaped", tarfile.REGTYPE, "no plain file name"),
        ("/tmp/escaped", tarfile.REGTYPE, "no plain file name"),
        (".hidden", tarfile.REGTYPE, "no plain file name"),
        ("a\nb", tarfile.REGTYPE, "no plain file name"),
        ("index.json", tarfile.SYMTYPE, "a link or a device"),
        ("index.json", tarfile.LNKTYPE, "a link or a device"),
        ("index.json", tarfile.CHRTYPE, "a link or a device"),
        ("index.json", tarfile.DIRTYPE, "a link or a device"),
        ("other.json", tarfile.REGTYPE, "no archive of images"),
    ],
)
def test_an_archive_writes_plain_files_in_its_folder_or_nothing(tmp_path, name, kind, message):
    archive = tmp_path / "images.tar"
    hostile(archive, name, kind)
    with pytest.raises(DataError, match=message) as error:
        travel.unpack_images(archive, tmp_path / "there" / "images")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] in (
        ["there", "images.tar"],
        ["images.tar", "there"],
    )


def test_an_archive_that_swells_is_refused(tmp_path):
    archive = tmp_path / "images.tar"
    hostile(archive, "index.json", data=bytes(8 << 20))
    assert archive.stat().st_size < 20_000
    with pytest.raises(DataError, match="far more than its size"):
        travel.unpack_images(archive, tmp_path / "images")


def test_a_damaged_archive_is_one_line(archive, tmp_path):
    whole = archive.read_bytes()
    broken = tmp_path / "images.tar"
    for damaged in (whole[: len(whole) // 2], b"no archive", gzip.compress(b"x" * 2000)):
        broken.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged") as error:
            travel.unpack_images(broken, tmp_path / "images")
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="cannot be read"):
        travel.unpack_images(tmp_path / "missing.tar", tmp_path / "images")


# -- the training --


class Small(Part):
    """Two convolutions in channels-last, a normalisation with buffers, a frozen weight."""

    name = "ldm"

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3),
            nn.Flatten(), nn.Linear(24 * 16, 24), nn.Linear(24, 24)
        ).to(memory_format=torch.channels_last)  # fmt: skip
        self.model[-1].weight.requires_grad_(False)
        self.memory = torch.arange(6.0)

    @property
    def trained(self):
        return self.model

    def read(self, step, count, crop_px):
        return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(step))

    def loss(self, batch, step):
        images = batch.contiguous(memory_format=torch.channels_last)
        loss = (self.model(images) - batch.mean((1, 2, 3))[:, None]).square().mean()
        return loss, {"loss": loss.detach()}

    def held_out(self):
        return {}

    def pictures(self, folder, step):
        (folder / "picture.png").write_bytes(b"drawn")

    def extra_state(self):
        return {"memory": self.memory}

    def load_extra_state(self, state):
        self.memory = state["memory"]


SETTINGS = LoopSettings(steps=40, batch_size=4, learning_rate=0.003, warmup_steps=5, ema_decay=0.9)


def loop_in(work: Path) -> TrainingLoop:
    return TrainingLoop(Small(), SETTINGS, work / "ldm", {"width": 24}, CPU)


@pytest.fixture
def work(tmp_path):
    """A working folder: a finished autoencoder, and 25 of 40 steps of a diffusion model."""
    made = tmp_path / "work"
    (made / "autoencoder").mkdir(parents=True)
    save_file({"w": torch.linspace(0, 1, 7)}, made / "autoencoder" / "weights.safetensors")
    (made / "autoencoder" / "facts.json").write_text('{"latent_scale": 1.25}')
    loop = loop_in(made)
    for step in range(25):
        loop._train_step(loop.part.read(step, 4, 8))
    loop._report(look=True)
    loop.save()
    return made


def test_a_training_goes_on_at_its_step_with_weights_rounded_to_float16(work, tmp_path):
    before = loop_in(work)
    assert travel.pack_training(work, tmp_path / "parts") == 1
    travel.unpack_training(tmp_path / "parts", tmp_path / "there")
    after = loop_in(tmp_path / "there")
    assert (after.step, after.seconds, after.rows) == (25, before.seconds, before.rows)
    ours, theirs = before.part.model.state_dict(), after.part.model.state_dict()
    for name, value in ours.items():
        rounded = value.half().float() if value.is_floating_point() else value
        assert torch.equal(theirs[name], rounded), name
    assert torch.equal(after.part.memory, before.part.memory)
    for one, other in zip(before.ema.shadow_params, after.ema.shadow_params, strict=True):
        assert one.stride() == other.stride()
        assert (one - other).abs().max() < 2e-3 * one.abs().max()
    assert after.ema.optimization_step == 25
    for p, state in after.optimizer.state.items():
        assert state["exp_avg_sq"].stride() == p.stride()
        assert state["exp_avg_sq"].shape == p.shape
        assert state["step"] == 25
        assert not state["exp_avg"].any()
    assert (tmp_path / "there" / "ldm" / "picture.png").read_bytes() == b"drawn"
    assert (tmp_path / "there" / "ldm" / "log.csv").read_text().count("\n") == 2
    assert after.run(report_every=20)


def test_the_rest_of_a_training_hardly_differs(work, tmp_path):
    travel.pack_training(work, tmp_path / "parts")
    travel.unpack_training(tmp_path / "parts", tmp_path / "there")
    losses = []
    for folder in (work, tmp_path / "there"):
        loop = loop_in(folder)
        loop.run(report_every=5)
        losses.append(np.array([row["loss"] for row in loop.rows[1:]]))
    assert len(losses[0]) == 3
    assert np.abs(losses[1] / losses[0] - 1).max() < 0.15


def test_what_came_back_travels_again_without_a_change(work, tmp_path):
    travel.pack_training(work, tmp_path / "parts")
    travel.unpack_training(tmp_path / "parts", tmp_path / "there")
    travel.pack_training(tmp_path / "there", tmp_path / "parts_2")
    travel.unpack_training(tmp_path / "parts_2", tmp_path / "back")
    finished = [
        load_file(folder / "autoencoder" / "weights.safetensors")["w"]
        for folder in (tmp_path / "there", tmp_path / "back")
    ]
    assert finished[0].dtype == torch.float16
    assert torch.equal(*finished)
    assert (
        json.loads((tmp_path / "back/autoencoder/facts.json").read_text())["latent_scale"] == 1.25
    )
    there, back = loop_in(tmp_path / "there"), loop_in(tmp_path / "back")
    for one, other in zip(there.parameters, back.parameters, strict=True):
        assert torch.equal(one, other)


def test_a_finished_part_is_rounded_as_it_will_travel(work, tmp_path):
    travel.round_weights(work / "autoencoder")
    rounded = load_file(work / "autoencoder" / "weights.safetensors")["w"]
    travel.pack_training(work, tmp_path / "parts")
    travel.unpack_training(tmp_path / "parts", tmp_path / "there")
    there = load_file(tmp_path / "there" / "autoencoder" / "weights.safetensors")["w"]
    assert torch.equal(rounded, there)
    assert torch.equal(rounded.float(), torch.linspace(0, 1, 7).half().float())


def test_the_second_moment_keeps_its_means(work):
    state = torch.load(work / "ldm" / "checkpoint.pt", weights_only=True)
    # Rows 1 and 3 times (1, 2, 3) and nothing else: the product of the means is exact.
    moment = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])
    state["ema"]["shadow_params"] = [torch.zeros(2, 3)]
    state["optimizer"]["state"] = {
        0: {"step": torch.tensor(7.0), "exp_avg": moment, "exp_avg_sq": moment}
    }
    tensors, rest = shrink(state)
    assert tensors["second_rows/0"].tolist() == [2, 6]
    assert tensors["second_columns/0"].tolist() == [2, 4, 6]
    again = expand(tensors, json.loads(json.dumps(rest)))["optimizer"]["state"][0]
    torch.testing.assert_close(again["exp_avg_sq"], moment)
    assert again["step"] == 7


def test_the_parts_obey_the_limits(work, tmp_path):
    out = tmp_path / "parts"
    count = travel.pack_training(work, out, part_bytes=9000)
    sizes = [file.stat().st_size for file in sorted(out.glob("*.bin"))]
    assert count == len(sizes) > 2
    assert max(sizes) == 9000
    travel.pack_training(work, out)  # and older ones do not stay behind
    assert sorted(file.name for file in out.iterdir()) == ["training-00.bin", "training.json"]
    with pytest.raises(DataError, match="training: 0.0 MiB do not travel, the limit is 0.0 MiB"):
        travel.pack_training(work, out, max_total=sum(sizes) - 1)


@pytest.mark.parametrize("damage", ["a byte", "cut", "missing", "no index", "swapped", "kind"])
def test_a_damaged_part_is_refused_in_one_line(work, tmp_path, damage):
    out = tmp_path / "parts"
    travel.pack_training(work, out, part_bytes=9000)
    first, second, index = (
        out / name for name in ("training-00.bin", "training-01.bin", "training.json")
    )
    message = "training-01.bin is not the file that"
    if damage == "a byte":
        data = bytearray(second.read_bytes())
        data[50] ^= 1
        second.write_bytes(data)
    elif damage == "cut":
        second.write_bytes(second.read_bytes()[:-1])
    elif damage == "missing":
        second.unlink()
        message = "training-01.bin is missing"
    elif damage == "no index":
        index.write_text("{")
        message = "no valid JSON"
    elif damage == "swapped":
        second.write_bytes(first.read_bytes())
    else:
        index.write_text(index.read_text().replace("training-01.bin", "../training-01.bin"))
        message = "no index of parts"
    with pytest.raises(DataError, match=message) as error:
        travel.unpack_training(out, tmp_path / "there")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"strides": [[10**9, 1, 1, 1]] * 10},
        {"average_of": ["nothing"] * 10},
        {"adam_steps": {"99": 1.0}},
        {"groups": 3},
    ],
)
def test_a_hostile_state_is_one_line(work, tmp_path, change):
    tensors, rest = shrink(torch.load(work / "ldm" / "checkpoint.pt", weights_only=True))
    folder = tmp_path / "state"
    folder.mkdir()
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(rest | change))
    with pytest.raises(DataError, match="not what it must be") as error:
        travel._restore_checkpoint(folder, "training.json: ldm")
    assert "\n" not in str(error.value)


def test_weights_beyond_float16_do_not_travel_silently(work, tmp_path):
    file = work / "ldm" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    state["weights"]["0.weight"][0] = 1e6
    torch.save(state, file)
    with pytest.raises(RunError, match=r"weight has values that float16 cannot hold"):
        travel.pack_training(work, tmp_path / "parts")


def test_a_folder_without_a_training_and_a_folder_in_the_way(work, tmp_path):
    with pytest.raises(RunError, match="holds no training"):
        travel.pack_training(tmp_path / "nowhere", tmp_path / "parts")
    travel.pack_training(work, tmp_path / "parts")
    with pytest.raises(BundleError, match="exists already"):
        travel.unpack_training(tmp_path / "parts", work)


def test_a_bundle_travels_whole(tmp_path):
    bundle = init_bundle("micro", seed=0, out=tmp_path / "micro")
    travel.pack_bundle(bundle, tmp_path / "parts", part_bytes=400_000)
    there = travel.unpack_bundle(tmp_path / "parts", tmp_path / "there")
    assert there.card == bundle.card


def test_a_model_that_is_too_large_is_refused_before_it_is_trained():
    travel.check_travels(PRESETS["tiny"])
    with pytest.raises(RunError, match=r"preset paper takes 1\d\d\d MiB, 55 MiB travel"):
        travel.check_travels(PRESETS["paper"])


# -- the script --


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parents[1] / "benchmarks" / "gpu_pretrain.py"
    spec = importlib.util.spec_from_file_location("gpu_pretrain", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_of_a_turn_reach_the_plan(script, monkeypatch):
    given = ["--images", "a", "--out", "b", "--steps", "9"]
    more = ["--set", "ldm.batch_size=64", "ldm.crops=[[0.5,128],[0.5,256]]"]
    monkeypatch.setattr("sys.argv", ["gpu_pretrain.py", *given, *more])
    plan = script.plan_from(script.parse())
    assert plan.autoencoder.steps == plan.ldm.steps == 9
    assert plan.ldm.batch_size == 64
    assert plan.ldm.crops == ((0.5, 128), (0.5, 256))
    monkeypatch.setattr("sys.argv", ["gpu_pretrain.py", *given, "--set", "ldm.colour=3"])
    with pytest.raises(ConfigError, match="no such setting"):
        script.plan_from(script.parse())


def test_a_turn_leaves_no_more_than_eight_files(script, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    for part in ("autoencoder", "ldm"):
        (work / part).mkdir(parents=True)
        (work / part / "log.csv").write_text(part)
        for number in range(4):
            (work / part / f"picture_{number}.png").write_bytes(b"x")
    out.mkdir()
    for number in range(4):
        (out / f"training-{number:02d}.bin").write_bytes(b"x")
    script.loose(work, out)
    names = sorted(file.name for file in out.iterdir())
    assert len(names) == 8
    assert (out / "log.csv").read_text() == "ldm"
    assert names[:4] == ["autoencoder-log.csv", "ldm-picture_0.png", "ldm-picture_1.png", "log.csv"]
