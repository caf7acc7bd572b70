"""``psd data``: what it prints, what it writes, and how it ends."""

import logging
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.main import run
from pathsegdiff.data.image import pixel_sha256
from pathsegdiff.data.init import init_manifest
from pathsegdiff.data.manifest import load_manifest, open_dataset
from pathsegdiff.errors import DataError
from tests.helpers_data import glands, make_folders, make_glas, stain


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An empty working folder; the command's log handler does not outlive the test."""
    monkeypatch.delenv("PSD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("pathsegdiff")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


def psd(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run ``psd data`` with arguments: exit code, stdout, stderr."""
    code = run(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def save(path: Path, pixels: np.ndarray) -> None:
    """Write an image, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# --- list and show


def test_list_says_what_is_known_and_what_is_here(capsys, tmp_path):
    (tmp_path / "data/glas").mkdir(parents=True)
    code, out, _ = psd(capsys, "list")
    assert code == 0
    assert "glas      165 images" in out
    assert "in data/glas" in out
    assert "embedded" in out
    assert "not here; `psd data show bcss` says where to get it" in out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glas", ["495b2a9f3d694545fbec06673fb3f40f", "train_1_anno.bmp", "objects are counted"]),
        ("bcss", ["CC0 1.0", "outside: code 0, don't care", "windows of 800 px at 0.5 um/px"]),
        ("demo", ["CC BY 4.0", "Shi L", "test: 22 images of 8 groups; the default for evaluation"]),
    ],
)
def test_show_has_licence_citation_source_layout_and_parts(capsys, name, expected):
    code, out, _ = psd(capsys, "show", name)
    assert code == 0
    for text in (*expected, "licence", "citation", "home page", "where", "layout"):
        assert text in out


def test_an_unknown_name_is_one_line_and_exit_code_1(capsys):
    code, out, err = psd(capsys, "show", "nothing")
    assert (code, out) == (1, "")
    assert err == (
        "Error: no data set is called 'nothing'; there are bcss, demo, ebhi, ebhi300, glas, or "
        "give the path of a manifest (.toml; `psd data init` writes one)\n"
    )


# --- check


def test_check_passes_a_whole_data_set(capsys, tmp_path):
    code, out, _ = psd(capsys, "check", make_glas(tmp_path))
    assert code == 0
    assert "train: 4 of 4 good\ntestA: 2 of 2 good\ntestB: 2 of 2 good\n" in out


def test_check_names_the_first_faults_and_fails(capsys, tmp_path):
    manifest = make_glas(tmp_path, counts={"train": 13, "testA": 1})
    root = tmp_path / "glaslike"
    for path in root.glob("train_*_anno.bmp"):
        path.unlink()
    save(root / "train_3.bmp", np.zeros((52, 77, 3), np.uint8))
    (root / "testA_1.bmp").unlink()
    (root / "testA_1_anno.bmp").unlink()
    code, out, _ = psd(capsys, "check", manifest)
    assert code == 1
    assert "train: 0 of 13 good, 13 missing, 1 altered" in out
    assert "  missing: train_1_anno.bmp is not there" in out
    assert "  altered: sample train_3: the pixels of image" in out
    assert "  ... and 4 more" in out
    assert "testA: none of 1 images is here; it is left out" in out
    assert "`psd data show " in out


def test_check_sends_nobody_to_get_what_is_there(capsys, tmp_path):
    manifest = make_glas(tmp_path, counts={"train": 2})
    (tmp_path / "glaslike" / "train_1.bmp").write_bytes(b"BM, cut off")
    code, out, _ = psd(capsys, "check", manifest)
    assert code == 1
    assert "unreadable: " in out and "psd data show" not in out


def test_check_of_data_that_is_not_here_is_one_line(capsys):
    code, out, err = psd(capsys, "check", "glas")
    assert (code, out) == (1, "")
    assert err.startswith(
        "Error: data set glas: there is no folder data/glas (the default; or give"
    )
    assert err.endswith("see `psd data show glas` for what is expected and where to get it\n")


# --- init


def test_init_writes_a_manifest_that_opens_without_options(capsys, tmp_path):
    images, masks = make_folders(tmp_path / "my")
    code, out, _ = psd(
        capsys, "init", "--images", images, "--masks", masks, "--out", "my.toml",
        "--region-px", 256, "--group-regex", "p[0-9]+",
    )  # fmt: skip
    assert code == 0
    assert "guessed: code 0 is background, code 255 foreground" in out
    assert "train: 8 images of 4 groups; the default for training" in out
    assert "test: 2 images of 1 groups; the default for evaluation" in out
    assert out.endswith("  psd extract --dataset my.toml\n")
    dataset = open_dataset("my.toml")
    assert len(dataset.samples) == 10
    assert dataset.manifest.grouped
    region = dataset.read(dataset.samples[0])
    assert region.image.shape == (256, 256, 3)
    assert 0.1 < region.label.mean() < 0.9
    assert psd(capsys, "check", "my.toml")[0] == 0


def test_init_and_its_data_can_be_moved_together(tmp_path):
    images, masks = make_folders(tmp_path / "a/my")
    init_manifest(images, masks, tmp_path / "a/my.toml")
    before = open_dataset(tmp_path / "a/my.toml").sha256
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert open_dataset(tmp_path / "b/my.toml").sha256 == before


def test_init_makes_the_same_split_wherever_it_runs(tmp_path):
    splits = []
    for place in ("a", "b/c"):
        images, masks = make_folders(tmp_path / place, count=20)
        result = init_manifest(images, masks, tmp_path / place / "m", group_regex="p([0-9]+)")
        splits.append([(row.source_id, row.split) for row in result.manifest.sources])
    assert splits[0] == splits[1]
    assert [split for _, split in splits[0]].count("test") == 4
    assert {row.group for row in result.manifest.sources} == {str(index) for index in range(10)}


@pytest.mark.parametrize("given", ["_anno", None])
def test_init_pairs_by_suffix_given_or_found(tmp_path, given):
    images, masks = make_folders(tmp_path, suffix="_anno")
    result = init_manifest(images, masks, tmp_path / "m.toml", mask_suffix=given)
    assert len(result.manifest.sources) == 10
    assert result.manifest.sources[0].mask == "masks/p0_0_anno.png"


def test_init_takes_images_and_masks_from_one_folder_with_subfolders(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        mask = glands(40, 40, 2, rng)
        save(tmp_path / f"in/case {index}/x.png", stain(mask, rng))
        save(tmp_path / f"in/case {index}/x_mask.png", mask)
    save(tmp_path / "in/alone.png", stain(mask, rng))
    save(tmp_path / "in/.hidden/x.png", stain(mask, rng))
    result = init_manifest(tmp_path / "in", tmp_path / "in", tmp_path / "m", group_regex="case .")
    assert [row.source_id for row in result.manifest.sources] == [
        f"case-{index}_x" for index in range(4)
    ]
    assert any("1 images without a mask are left out, such as alone" in n for n in result.notes)


def test_init_finds_object_masks(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        mask = glands(80, 80, 3 + index, rng)
        save(tmp_path / f"images/{index}.png", stain(mask, rng))
        save(tmp_path / f"masks/{index}.png", mask)
    result = init_manifest(tmp_path / "images", tmp_path / "masks", tmp_path / "m.toml")
    assert result.manifest.scheme.objects == "foreground"
    windowed = init_manifest(
        tmp_path / "images", tmp_path / "masks", tmp_path / "w.toml", window_px=800
    )
    assert windowed.manifest.scheme.objects is None
    assert any("objects are not counted" in note for note in windowed.notes)


def many_codes(tmp_path: Path, codes: list[int]) -> tuple[Path, Path]:
    """Six images whose masks hold the codes in scattered pieces."""
    rng = np.random.default_rng(0)
    for index in range(6):
        mask = np.kron(rng.choice(codes, (12, 12)), np.ones((6, 6))).astype(np.uint8)
        save(tmp_path / f"images/{index}.png", stain(mask, rng))
        save(tmp_path / f"masks/{index}.png", mask)
    return tmp_path / "images", tmp_path / "masks"


def test_init_makes_each_code_a_class_and_255_dont_care(tmp_path):
    result = init_manifest(*many_codes(tmp_path, [0, 1, 4, 255]), tmp_path / "m.toml")
    scheme = result.manifest.scheme
    assert scheme.names == ("background", "code 1", "code 4")
    assert scheme.dont_care is not None
    assert scheme.dont_care.codes == (255,)
    assert scheme.objects is None
    assert len(set(scheme.colours)) == 3
    labels = [
        region.label for region in map(open_dataset(tmp_path / "m.toml").read, _samples(tmp_path))
    ]
    for class_id, pixels in enumerate(result.class_pixels):
        # 72 px are enlarged to 768: the shares stay.
        share = np.mean([(label == class_id).mean() for label in labels])
        assert share == pytest.approx(pixels / (6 * 72 * 72), abs=1e-3)


def _samples(tmp_path):
    return open_dataset(tmp_path / "m.toml").samples


def test_init_cuts_large_images_into_windows_and_keeps_their_resolution(tmp_path):
    images, masks = make_folders(tmp_path, count=2, size=(410, 520))
    result = init_manifest(images, masks, tmp_path / "m.toml", region_px=256, mpp=0.5)
    assert result.manifest.rule.kind == "window"
    assert result.manifest.rule.window_px == 267
    assert result.manifest.mpp == 0.5
    assert len(open_dataset(tmp_path / "m.toml").samples) == 2 * 2 * 2
    assert len(open_dataset(tmp_path / "m.toml", mpp=0.25).samples) == 2 * 4 * 4


def test_init_enlarges_small_images_only_with_a_word(tmp_path):
    result = init_manifest(*make_folders(tmp_path), tmp_path / "m.toml")
    assert any("enlarges them 12.8 times; --region-px 256 is faster" in n for n in result.notes)


def test_init_notes_jpeg_files_so_that_another_decoder_can_be_told_from_another_file(tmp_path):
    images, masks = make_folders(tmp_path)
    for path in images.iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    sources = init_manifest(images, masks, tmp_path / "m.toml").manifest.sources
    assert all(source.image_file_sha256 and source.image_sha256 for source in sources)


def test_init_survives_quotes_and_backslashes_in_folder_names(tmp_path):
    folder = tmp_path / 'my "own" \\ data'
    result = init_manifest(*make_folders(folder), tmp_path / "m.toml")
    assert load_manifest(result.manifest.path).root == tmp_path / 'my "own" \\ data'
    assert len(open_dataset(tmp_path / "m.toml").samples) == 10


def test_init_hashes_what_a_reader_will_see(tmp_path):
    images, masks = make_folders(tmp_path, count=2)
    source = init_manifest(images, masks, tmp_path / "m.toml").manifest.sources[0]
    assert source.image_sha256 == pixel_sha256(np.asarray(Image.open(images / "p0_0.png")))
    assert source.size_px == (60, 80)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda i, m: shutil.rmtree(m), {}, r"masks: there is no such folder"),
        (lambda i, m: [p.unlink() for p in i.iterdir()], {}, r"images holds no png, bmp, tif"),
        (lambda i, m: None, {"mask_suffix": "_x"}, r"no image has a mask: .*p0_0, .*p0_0_x\.\*;"),
        (lambda i, m: None, {"group_regex": "p("}, r"--group-regex 'p\(' is no pattern"),
        (lambda i, m: None, {"group_regex": "z+"}, r"finds no group in p0_0\.png"),
        (lambda i, m: None, {"group_regex": "p"}, r"all 10 images are of one group"),
        (lambda i, m: None, {"region_px": 100}, r"region_px must be a multiple of 256"),
        (lambda i, m: None, {"window_px": 300}, r"window_px must be at least region_px \(768\)"),
        (lambda i, m: None, {"mpp": 0}, r"mpp must be from 0\.01 to 100 um/px"),
        (lambda i, m: (i / "p0_0.png").write_bytes(b"x"), {}, r"p0_0\.png is no readable png"),
        (
            lambda i, m: save(m / "p0_0.png", np.zeros((5, 5), np.uint8)),
            {},
            r"p0_0\.png is 5 x 5 px, its image 60 x 80",
        ),
        (
            lambda i, m: [save(p, np.zeros((60, 80), np.uint8)) for p in list(m.iterdir())],
            {},
            r"all masks hold the code 0 alone",
        ),
        (
            lambda i, m: save(
                m / "p0_0.png", np.random.default_rng(0).integers(0, 99, (60, 80), np.uint8)
            ),
            {},
            r"masks hold 99 codes|masks hold 100 codes",
        ),
        (lambda i, m: (i / "a\nb.png").write_bytes(b""), {}, r"a\\nb\.png: the name holds a contr"),
    ],
)
def test_init_refuses_what_makes_no_data_set_and_leaves_nothing(tmp_path, spoil, options, message):
    images, masks = make_folders(tmp_path / "my")
    spoil(images, masks)
    with pytest.raises(DataError, match=message) as caught:
        init_manifest(images, masks, tmp_path / "m.toml", **options)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.glob("m.*"))


def test_init_overwrites_nothing(tmp_path):
    images, masks = make_folders(tmp_path)
    (tmp_path / "m.csv").write_text("mine")
    with pytest.raises(DataError, match=r"m\.csv exists; delete it, or choose another --out"):
        init_manifest(images, masks, tmp_path / "m.toml")
    assert (tmp_path / "m.csv").read_text() == "mine"


def test_resize_and_window_exclude_each_other(capsys, tmp_path):
    code, _, err = psd(
        capsys, "init", "--images", ".", "--masks", ".", "--out", "m", "--resize", "--window", 800
    )
    assert code == 2
    assert "--resize and --window exclude each other" in err


def test_each_command_shows_an_example(capsys):
    for command in ("list", "show", "check", "init"):
        code, out, _ = psd(capsys, command, "--help")
        assert code == 0
        assert f"psd data {command}" in out.split("Example:")[1]


def test_the_next_command_that_init_names_can_be_pasted_into_a_shell(capsys, tmp_path):
    images, masks = make_folders(tmp_path / "my data")
    out = tmp_path / "my data" / "mine.toml"
    code, said, _ = psd(capsys, "init", "--images", images, "--masks", masks, "--out", out)
    assert code == 0
    assert shlex.split(said.splitlines()[-1])[-2:] == ["--dataset", str(out)]
