"""``psd data fetch`` and ``psd models pull``: from a server on this machine to a checked result."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

import cli.fetch
from cli.main import run
from cli.progress import Progress, TransferProgress
from pathsegdiff.data.fetch_table import FetchTable
from pathsegdiff.data.manifest import load_manifest
from pathsegdiff.diffusion import pull
from pathsegdiff.diffusion.bundle import has_encoder, load_bundle
from pathsegdiff.diffusion.encoder import NAMED_ENCODERS, EncoderConfig
from pathsegdiff.diffusion.project import read_project
from pathsegdiff.diffusion.pull import SOURCES, ModelSource, SourceFile
from pathsegdiff.errors import DataError
from pathsegdiff.fetch import download as module
from pathsegdiff.fetch.download import Remote, State, check_drive_id, check_url
from tests.helpers_archives import content, make_tar, make_zip
from tests.helpers_compvis import averaged_state, write_files, zoom_project, zoom_state
from tests.helpers_data import make_glas, write_manifest
from tests.helpers_http import Server, act_as_drive, put_drive_folder, serving

GOLDEN = Path(__file__).parent / "golden" / "vq_f4"
FOLDER = "1zqbdkQF8i5cEmZOGmbdQm-EP8dRYtvss"
ROW = {"split": "train", "group": "1"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """An empty working folder, no waiting, and the command's log handler does not stay."""
    monkeypatch.delenv("PSD_DATA", raising=False)
    monkeypatch.setenv("PSD_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(module, "RETRIES", 0)
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("pathsegdiff")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, name, getattr(logger, name))


@pytest.fixture
def server():
    """A server without pages."""
    with serving() as served:
        yield served


def psd(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run ``psd`` with arguments: exit code, stdout, stderr."""
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def add_fetch(manifest: Path, **values: object) -> None:
    """Give a manifest a [fetch] table."""
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items()]
    manifest.write_text(manifest.read_text() + "\n[fetch]\n" + "".join(lines))


@pytest.fixture
def archived(tmp_path, server) -> tuple[Path, Path, Path]:
    """A GlaS-shaped data set whose files are on the server alone: manifest, its root, archive."""
    manifest = make_glas(tmp_path, size=(300, 400))
    root = tmp_path / "glaslike"
    files = {f"Glas Like (2016)/{path.name}": path.read_bytes() for path in root.iterdir()}
    archive = make_zip(tmp_path / "release.zip", files)
    shutil.rmtree(root)
    data = archive.read_bytes()
    assert len(data) > 1_200_000  # several blocks of a transfer
    url = server.put("/release.zip", data)
    add_fetch(manifest, kind="archive", url=url, md5=hashlib.md5(data).hexdigest())
    return manifest, root, archive


# --- archives


def test_an_archive_is_fetched_unpacked_and_checked(capsys, archived):
    manifest, root, _ = archived
    code, out, err = psd(capsys, "data", "fetch", manifest, "--accept-licence")
    assert code == 0, err
    assert out.startswith("glaslike: made by a test\nlicence: CC0\n")
    assert "release.zip: whole, md5 " in out
    assert "unpacked 16 files into" in out
    assert "train: 4 of 4 good\ntestA: 2 of 2 good\ntestB: 2 of 2 good\n" in out
    assert out.endswith(f"Next: psd extract --dataset {manifest}\n")
    assert "release.zip: 524 kB of 2.64 MB" in err
    assert "unpack: 16/16 files" in err
    assert not list((root / ".fetch").glob("release*"))
    assert psd(capsys, "data", "check", manifest)[0] == 0


def test_what_is_there_is_not_fetched_again_and_terms_are_asked_for_once(capsys, archived, server):
    manifest, root, _ = archived
    assert psd(capsys, "data", "fetch", manifest, "--accept-licence")[0] == 0
    asked = len(server.asked)
    code, out, _ = psd(capsys, "data", "fetch", manifest)
    assert code == 0
    assert out.startswith("all 16 files are already there\n")
    assert len(server.asked) == asked
    (root / "train_1.bmp").unlink()
    code, out, _ = psd(capsys, "data", "fetch", manifest)
    assert code == 0
    assert "licence" not in out
    assert "unpacked 1 files into" in out and "15 were there already" in out


def test_without_acceptance_nothing_is_asked_for(capsys, archived, server):
    manifest, root, _ = archived
    code, out, err = psd(capsys, "data", "fetch", manifest)
    assert code == 1
    assert "licence: CC0" in out
    assert err == (
        "Error: the terms of glaslike must be accepted before anything is fetched; "
        "--accept-licence does so\n"
    )
    assert not server.asked and not root.exists()


@pytest.mark.parametrize(("answer", "expected"), [(True, 0), (False, 1)])
def test_on_a_terminal_a_question_is_asked(capsys, archived, monkeypatch, answer, expected):
    manifest, root, _ = archived
    questions = []
    monkeypatch.setattr(cli.fetch, "_on_terminal", lambda: True)
    monkeypatch.setattr("click.confirm", lambda text: questions.append(text) or answer)
    assert psd(capsys, "data", "fetch", manifest)[0] == expected
    assert questions == ["Do you accept these terms?"]
    assert (root / "train_1.bmp").exists() == answer
    # A changed text asks again.
    manifest.write_text(manifest.read_text().replace('"CC0"', '"CC BY 4.0"'))
    (root / "train_1.bmp").unlink(missing_ok=True)
    psd(capsys, "data", "fetch", manifest)
    assert len(questions) == 2


def test_ctrl_c_exits_with_130_keeps_the_part_and_the_same_command_continues(
    capsys, archived, server, monkeypatch
):
    manifest, root, archive = archived
    show = TransferProgress.show

    def stop(self: TransferProgress, state: State) -> None:
        show(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TransferProgress, "show", stop)
        code, _, err = psd(capsys, "data", "fetch", manifest, "--accept-licence")
    assert code == 130
    assert "Interrupted" in err
    (part,) = (root / ".fetch").glob("*.part")
    kept = part.stat().st_size
    assert 0 < kept < archive.stat().st_size
    assert psd(capsys, "data", "fetch", manifest)[0] == 0
    assert server.ranges("/release.zip")[-1] == f"bytes={kept}-"


def test_a_moved_archive_names_the_way_by_hand(capsys, archived, server):
    manifest, _, _ = archived
    server.put("/release.zip", b"", status=404)
    text = Path(manifest).read_text(encoding="utf-8")
    assert "homepage" not in text
    where = 'where = "Ask its authors."\nhomepage = "https://example.org/set"\n'
    Path(manifest).write_text(where + text, encoding="utf-8")
    code, _, err = psd(capsys, "-q", "data", "fetch", manifest, "--accept-licence")
    assert code == 1 and err.count("\n") == 1
    assert "there is no such file any more (status 404)" in err
    assert "by hand: Ask its authors. (home page: https://example.org/set) Layout: " in err


def test_a_corrupted_archive_is_not_unpacked(capsys, archived, server):
    manifest, root, _ = archived
    server.pages["/release.zip"].content = server.pages["/release.zip"].content[:-1] + b"?"
    code, _, err = psd(capsys, "data", "fetch", manifest, "--accept-licence")
    assert code == 1
    assert "its md5 is " in err and ", expected " in err
    assert len([line for line in err.splitlines() if line.startswith("Error")]) == 1
    assert [path.name for path in root.iterdir()] == [".fetch"]


def test_a_hostile_archive_is_refused_whatever_its_hash(capsys, tmp_path, server):
    row = {"sample_id": "a", "image": "a.png", "mask": "b.png", **ROW}
    manifest = write_manifest(tmp_path / "m.toml", [row], root="files/deep")
    archive = make_tar(tmp_path / "x.tar.gz", {"a.png": b"", "../../escaped": b"bad"})
    url = server.put("/x.tar.gz", archive.read_bytes())
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    add_fetch(manifest, kind="archive", url=url, sha256=sha256)
    code, _, err = psd(capsys, "-q", "data", "fetch", manifest, "--accept-licence")
    assert code == 1
    assert err.count("\n") == 1 and "'../../escaped', a name that could lead out" in err
    assert not list(tmp_path.rglob("escaped"))


def test_a_folder_that_the_manifest_names_is_kept(capsys, tmp_path, server):
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    Image.new("L", (40, 40)).save(tmp_path / "1_mask.png")
    files = {f"case/{name}": (tmp_path / name).read_bytes() for name in ("1.png", "1_mask.png")}
    data = make_tar(tmp_path / "x.tgz", files).read_bytes()
    row = {"sample_id": "a", "image": "case/1.png", "mask": "case/1_mask.png", **ROW}
    manifest = write_manifest(tmp_path / "m.toml", [row])
    sha256 = hashlib.sha256(data).hexdigest()
    add_fetch(manifest, kind="archive", url=server.put("/x.tgz", data), sha256=sha256)
    code, out, _ = psd(capsys, "data", "fetch", manifest, "--accept-licence")
    assert code == 0 and "train: 1 of 1 good" in out
    assert Path("data/m/case/1.png").exists()


def test_files_that_do_not_fit_the_manifest_fail_the_check(capsys, tmp_path, server, archived):
    manifest, root, _ = archived
    root.mkdir()
    Image.new("RGB", (400, 300)).save(root / "train_2.bmp")
    code, _, err = psd(capsys, "data", "fetch", manifest, "--accept-licence")
    assert code == 1
    assert "train_2.bmp is there with other content than in the archive" in err
    (root / "train_2.bmp").rename(root / "train_2.png")
    code, out, _ = psd(capsys, "data", "fetch", manifest)
    assert code == 0 and "train: 4 of 4 good" in out  # the archive's own is preferred


def test_a_data_root_of_ones_own_is_named_in_the_next_command(capsys, archived, tmp_path):
    manifest, root, _ = archived
    code, out, _ = psd(
        capsys, "data", "fetch", manifest, "--data-root", tmp_path / "my data", "--accept-licence"
    )
    assert code == 0
    assert out.endswith(f"--data-root '{tmp_path}/my data'\n")
    assert (tmp_path / "my data/train_1.bmp").exists() and not root.exists()


def test_a_data_set_without_fetch_says_what_to_do_by_hand(capsys):
    code, out, err = psd(capsys, "data", "fetch", "ebhi", "--accept-licence")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "by hand: 1809 of the images of EBHI-Seg" in err and "figshare" in err


# --- Google Drive


@pytest.fixture
def on_drive(tmp_path, server, monkeypatch) -> Path:
    """Manifest of two images whose files are in a Google Drive folder, among others."""
    act_as_drive(server, monkeypatch)
    manifest = make_glas(tmp_path, counts={"train": 2})
    root = tmp_path / "glaslike"
    rows = [
        {"sample_id": f"s{index}", "image": f"rgb/{index}.bmp", "mask": f"masks/{index}.bmp", **ROW}
        for index in (1, 2)
    ]
    folders = {
        "rgb": {f"{i}.bmp": (root / f"train_{i}.bmp").read_bytes() for i in (1, 2)},
        "masks": {f"{i}.bmp": (root / f"train_{i}_anno.bmp").read_bytes() for i in (1, 2)},
        "unwanted": {"1.bmp": b"another"},
    }
    put_drive_folder(server, FOLDER, "all", {"public": folders, "readme.txt": b"r"})
    manifest = write_manifest(
        tmp_path / "d.toml", rows, where="Folder X\ninto data/d.", layout="data/d/rgb/N.bmp"
    )
    add_fetch(manifest, kind="drive", folder=FOLDER, subfolders=["rgb", "masks"], bytes=100_000)
    return manifest


def test_the_files_of_a_drive_folder_come_to_their_places(capsys, on_drive, server):
    code, out, err = psd(capsys, "data", "fetch", on_drive, "--accept-licence")
    assert code == 0, err
    assert "4 files from Google Drive, 0 were there already" in out
    assert "train: 2 of 2 good" in out
    files = [name for name in content(Path("data/d")) if not name.startswith(".fetch")]
    assert sorted(files) == ["masks/1.bmp", "masks/2.bmp", "rgb/1.bmp", "rgb/2.bmp"]
    assert "d: 4/4 files" in err
    Path("data/d/rgb/2.bmp").unlink()
    before = len(server.asked)
    code, out, _ = psd(capsys, "data", "fetch", on_drive)
    assert code == 0
    assert "1 files from Google Drive, 3 were there already" in out
    assert [path for path, _ in server.asked[before:] if path.startswith("/uc")] == [
        f"/uc?id={FOLDER}-00-00-01"
    ]


def test_a_file_that_was_altered_since_it_came_is_named(capsys, on_drive, server):
    assert psd(capsys, "data", "fetch", on_drive, "--accept-licence")[0] == 0
    mask = Path("data/d/masks/2.bmp")
    data = bytearray(mask.read_bytes())
    data[-1] ^= 1  # another code, as good as any
    mask.write_bytes(data)
    code, out, _ = psd(capsys, "data", "check", on_drive)
    assert code == 1
    assert "train: 1 of 2 good, 1 altered" in out
    assert "2.bmp is not the file that was fetched: SHA-256" in out
    mask.unlink()
    assert psd(capsys, "data", "fetch", on_drive)[0] == 0
    record = Path("data/d/.fetch/hashes.json")
    assert sorted(json.loads(record.read_text())) == [
        "masks/1.bmp", "masks/2.bmp", "rgb/1.bmp", "rgb/2.bmp"
    ]  # fmt: skip
    record.write_text("[" * 100_000)
    code, _, err = psd(capsys, "-q", "data", "check", on_drive)
    assert code == 1 and err.count("\n") == 1 and "hashes.json is damaged" in err


def test_where_drive_refuses_the_way_by_hand_and_the_layout_are_said(capsys, on_drive, server):
    server.put(
        f"/uc?id={FOLDER}-00-01-01",
        b'<html>\n<p class="uc-error-subcaption">Too many users have viewed this file.</p></html>',
        kind="text/html",
    )
    code, _, err = psd(capsys, "-q", "data", "fetch", on_drive, "--accept-licence")
    assert code == 1
    assert err.count("\n") == 1
    assert "Too many users have viewed this file." in err
    assert "put the files there by hand: Folder X into data/d. Layout: data/d/rgb/N.bmp" in err
    assert Path("data/d/rgb/1.bmp").exists()  # what came before is kept, and known
    assert "rgb/1.bmp" in json.loads(Path("data/d/.fetch/hashes.json").read_text())


def test_files_that_drive_lacks_are_named_and_fail_the_check(capsys, on_drive, server):
    page = server.pages[f"/embeddedfolderview?id={FOLDER}-00-01"]
    page.content = page.content.replace(b">2.bmp<", b">renamed.bmp<")
    code, out, _ = psd(capsys, "data", "fetch", on_drive, "--accept-licence")
    assert code == 1
    assert "the Drive folder lacks 1 files, such as masks/2.bmp" in out
    assert "train: 1 of 2 good, 1 missing" in out


def test_a_disk_that_is_too_small_for_all_files_is_told(capsys, on_drive, server, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=99_999))
    code, _, err = psd(capsys, "-q", "data", "fetch", on_drive, "--accept-licence")
    assert code == 1
    assert "100,000 bytes are needed and 99,999 are free" in err
    assert err.endswith("make room, or choose another --data-root\n")
    assert not server.asked


# --- the table


ARCHIVE = {"kind": "archive", "url": "https://example.org/a.zip", "md5": "0" * 32}
DRIVE = {"kind": "drive", "folder": FOLDER, "subfolders": ["rgb"]}


def test_the_known_data_sets_can_be_fetched_from_where_they_are():
    glas, bcss = load_manifest("glas").fetch, load_manifest("bcss").fetch
    assert glas is not None and bcss is not None
    assert glas.remote == Remote(
        url="https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest/download/"
        "warwick_qu_dataset_released_2016_07_08.zip",
        md5="495b2a9f3d694545fbec06673fb3f40f",
    )
    assert glas.file_name == "warwick_qu_dataset_released_2016_07_08.zip"
    assert (bcss.folder, bcss.subfolders) == (FOLDER, ("rgbs_colorNormalized", "masks"))
    assert [load_manifest(name).fetch for name in ("demo", "ebhi", "ebhi300")] == [None] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("x", "fetch must be a table whose kind is one of archive, drive"),
        ({"kind": "ftp"}, "fetch must be a table whose kind"),
        ({**ARCHIVE, "run": "rm"}, "unknown 'run'; known: kind, url, md5, sha256, bytes"),
        ({**ARCHIVE, "folder": FOLDER}, "unknown 'folder'"),
        ({**ARCHIVE, "url": "http://example.org/a.zip"}, r"fetch\.url must be an https"),
        ({**ARCHIVE, "url": "file:///etc/a.zip"}, r"fetch\.url must be an https"),
        ({**ARCHIVE, "url": "https://example.org/a.exe"}, "must end in a file name with"),
        ({**ARCHIVE, "url": "https://example.org/%2e%2e%2f.zip"}, "must end in a file name"),
        ({**ARCHIVE, "url": "https://example.org/a?x=/a.zip"}, "must end in a file name"),
        ({"kind": "archive", "url": ARCHIVE["url"]}, "needs md5 or sha256"),
        ({**ARCHIVE, "sha256": "0" * 64}, "needs md5 or sha256, and not both"),
        ({**ARCHIVE, "md5": "0" * 31}, r"fetch\.md5 must be 32 hex digits"),
        ({**ARCHIVE, "md5": 7}, r"fetch\.md5 must be 32 hex digits"),
        ({**ARCHIVE, "bytes": 0}, r"fetch\.bytes must be a whole number above 0, got 0"),
        ({**ARCHIVE, "bytes": True}, r"fetch\.bytes must be"),
        ({**DRIVE, "folder": "../x"}, r"fetch\.folder must be the id"),
        ({**DRIVE, "folder": None}, r"fetch\.folder must be the id"),
        ({**DRIVE, "subfolders": []}, r"fetch\.subfolders must be a list"),
        ({**DRIVE, "subfolders": ["../x"]}, r"fetch\.subfolders must be a list"),
        ({**DRIVE, "subfolders": "rgb"}, r"fetch\.subfolders must be a list"),
        ({**DRIVE, "url": "https://x"}, "unknown 'url'"),
    ],
)
def test_a_table_that_cannot_be_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        FetchTable.from_dict(values)


def test_the_manifest_is_named_with_what_is_wrong_in_its_table(tmp_path):
    row = {"sample_id": "a", "image": "rgb/a.png", "mask": "masks/a.png", **ROW}
    manifest = write_manifest(tmp_path / "m.toml", [row])
    add_fetch(manifest, **DRIVE)
    with pytest.raises(
        DataError, match=r"m\.toml: fetch\.subfolders \(rgb\) must hold every file, not masks/a"
    ):
        load_manifest(manifest)


# --- models


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small(server: Server, monkeypatch) -> ModelSource:
    """A published model of the supported kind: two files on Drive, two at plain addresses."""
    act_as_drive(server, monkeypatch)
    folders = {
        "configs": {
            "2023-01-01-project.yaml": b"of an earlier run",
            "2023-02-01-project.yaml": (GOLDEN / "project.yaml").read_bytes(),
            "2023-02-01-lightning.yaml": b"no project",
        },
        "checkpoints": {"last.ckpt": (GOLDEN / "ldm.ckpt").read_bytes()},
    }
    put_drive_folder(server, FOLDER, "run", folders)
    encoder = SourceFile(
        name="vit.pth",
        role="encoder",
        remote=Remote(
            url=server.put("/vit.pth", (GOLDEN / "vit256.pth").read_bytes()),
            sha256=sha256_of(GOLDEN / "vit256.pth"),
            size=(GOLDEN / "vit256.pth").stat().st_size,
        ),
        kept_by="encoder-alone",
    )
    config = SourceFile(
        name="encoder.json",
        role="encoder_config",
        remote=Remote(url=server.put("/encoder.json", (GOLDEN / "encoder.json").read_bytes())),
    )
    texts = {"title": "small", "licence": "CC0", "citation": "none", "homepage": "none"}
    source = ModelSource(
        name="small",
        files=(
            SourceFile(name="p.yaml", role="project", drive=(FOLDER, "configs/*-project.yaml")),
            SourceFile(name="last.ckpt", role="ldm", drive=(FOLDER, "checkpoints/last.ckpt")),
            encoder,
            config,
        ),
        bundle=True,
        **texts,
    )
    alone = ModelSource(
        name="encoder-alone", files=(encoder,), bundle=False, note="as a file", **texts
    )
    monkeypatch.setattr(pull, "SOURCES", (source, alone))
    return source


def test_a_published_model_becomes_a_bundle_that_is_found_by_name(capsys, small, tmp_path):
    code, out, err = psd(capsys, "models", "pull", "small", "--accept-licence")
    assert code == 0, err
    assert out.startswith("small: small\nlicence: CC0\n")
    assert "p.yaml (configs/2023-02-01-project.yaml): whole" in out
    assert "small: imported, 871 tensors, into" in out
    assert out.endswith("Next: psd models show small\n")
    card = load_bundle(tmp_path / "models/small").card
    assert (card.name, card.title, card.licence) == ("small", "small", "CC0")
    assert sha256_of(GOLDEN / "ldm.ckpt")[:12] in card.provenance["ldm"]
    code, shown, _ = psd(capsys, "models", "show", "small")
    assert code == 0 and "13, 544 channels" in shown
    assert not (tmp_path / "models/.fetch/small").exists()
    assert "encoder" not in psd(capsys, "models", "list")[1]


def test_a_model_that_is_there_is_not_pulled_again(capsys, small, server):
    assert psd(capsys, "models", "pull", "small", "--accept-licence")[0] == 0
    before = len(server.asked)
    code, out, _ = psd(capsys, "models", "pull", "small")
    assert code == 0
    assert "small: already there" in out
    assert len(server.asked) == before


def test_an_encoder_that_is_kept_as_a_file_is_used_for_the_bundle(capsys, small, server, tmp_path):
    code, out, _ = psd(capsys, "models", "pull", "encoder-alone", "--accept-licence")
    assert code == 0
    assert "encoder-alone: 1 files in" in out and "as a file" in out
    kept = tmp_path / "models/encoder-alone/vit.pth"
    assert kept.read_bytes() == (GOLDEN / "vit256.pth").read_bytes()
    assert psd(capsys, "models", "pull", "encoder-alone")[0] == 0
    code, out, _ = psd(capsys, "models", "pull", "small", "--accept-licence")
    assert code == 0
    assert "vit.pth: already there" in out
    assert len(server.ranges("/vit.pth")) == 1
    assert kept.exists()


def test_a_pull_that_broke_off_continues_with_the_files_that_it_has(
    capsys, small, server, tmp_path
):
    checkpoint = f"/uc?id={FOLDER}-01-00"
    size = len(server.pages[checkpoint].content)
    assert size > 3 * 512 * 1024
    server.pages[checkpoint].breaks_after = size - 1
    code, _, err = psd(capsys, "-q", "models", "pull", "small", "--accept-licence")
    assert code == 1
    assert err.count("\n") == 1 and "the connection broke off" in err
    assert not (tmp_path / "models/small").exists()
    code, out, _ = psd(capsys, "models", "pull", "small")
    assert code == 0
    assert "p.yaml: already there" in out
    assert server.ranges(checkpoint)[-1] == f"bytes={(size - 1) // 524288 * 524288}-"


def test_files_that_make_no_bundle_are_kept_and_named(capsys, small, server, tmp_path):
    server.pages[f"/uc?id={FOLDER}-00-01"].content = b"no: project"
    code, _, err = psd(capsys, "-q", "models", "pull", "small", "--accept-licence")
    assert code == 1
    assert err.count("\n") == 1
    assert "p.yaml: model is missing" in err
    assert f"the files are kept in {tmp_path}/models/.fetch/small" in err


@pytest.mark.parametrize("option", [[], ["--out", "here/mine"]])
def test_an_unaccepted_licence_and_a_folder_in_the_way_end_before_the_first_byte(
    capsys, small, server, tmp_path, option
):
    code, out, err = psd(capsys, "models", "pull", "small", *option)
    assert code == 1
    assert "licence: CC0" in out
    assert "the terms of small must be accepted" in err and "--accept-licence" in err
    folder = Path(option[1]) if option else tmp_path / "models/small"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    code, _, err = psd(capsys, "models", "pull", "small", *option, "--accept-licence")
    assert code == 1
    assert "mine.txt" not in err and err.count("\n") == 1
    assert not server.asked


def test_a_disk_that_is_too_small_for_a_model_is_told(capsys, small, server, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = psd(capsys, "-q", "models", "pull", "small", "--accept-licence")
    assert code == 1
    assert "bytes are needed and 1,000 are free" in err
    assert err.endswith("make room, or choose another --out\n")
    assert not server.asked


@pytest.fixture
def zoom(server: Server, monkeypatch, tmp_path) -> Path:
    """A small ZoomLDM that is pulled, and the encoder that is not: its path."""
    project = zoom_project()
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump(project))
    state = zoom_state(read_project(tmp_path / "probe.yaml"))
    files = write_files(tmp_path / "zoom", project, {**state, **averaged_state(state)})
    shape = EncoderConfig.from_dict(json.loads(files["encoder_config"].read_text()), "test")
    monkeypatch.setitem(NAMED_ENCODERS, "small", shape)
    roles = {"project": "config.yaml", "ldm": "weights.ckpt"}
    source = ModelSource(
        name="zoom",
        title="small",
        licence="MIT",
        citation="none",
        homepage="none",
        files=tuple(
            SourceFile(
                name=name,
                role=role,
                remote=Remote(url=server.put(f"/{name}", files[role].read_bytes())),
            )
            for role, name in roles.items()
        ),
        bundle=True,
        ema=True,
        encoder_config="small",
        note="it has no patch encoder",
    )
    monkeypatch.setattr(pull, "SOURCES", (source,))
    return files["encoder"]


def test_a_model_whose_encoder_nobody_may_pass_on_is_pulled_with_and_without_it(
    capsys, zoom, tmp_path
):
    code, out, err = psd(capsys, "models", "pull", "zoom", "--accept-licence")
    assert code == 0, err
    assert "zoom: it has no patch encoder\nNext: psd models show zoom\n" in out
    bundle = load_bundle("zoom")
    assert not has_encoder(bundle.path)
    assert bundle.card.provenance["UNet weights"] == "averaged (EMA)"

    code, _, err = psd(capsys, "-q", "models", "pull", "zoom", "--encoder", zoom)
    assert code == 1
    assert "is zoom without an encoder; remove it or choose another --out" in err
    whole = ["--out", "models/whole", "--encoder"]
    code, _, err = psd(capsys, "-q", "models", "pull", "zoom", *whole, "nowhere.bin")
    assert (code, err) == (1, "Error: --encoder nowhere.bin is no file\n")
    code, out, err = psd(capsys, "models", "pull", "zoom", *whole, zoom)
    assert code == 0, err
    assert "it has no patch encoder" not in out
    assert has_encoder(Path("models/whole"))
    assert sha256_of(zoom) in load_bundle("models/whole").card.provenance["encoder"]


def test_files_that_an_earlier_version_kept_are_named(capsys, zoom, server, tmp_path):
    kept = tmp_path / "models/zoom"
    kept.mkdir(parents=True)
    (kept / "config.yaml").write_text("kept")
    code, _, err = psd(capsys, "-q", "models", "pull", "zoom", "--accept-licence")
    assert code == 1 and not server.asked
    assert "zoom holds config.yaml and no bundle: remove it, or make a bundle of these" in err


def test_an_encoder_for_a_model_that_brings_its_own_is_refused(capsys, small, tmp_path):
    code, _, err = psd(capsys, "-q", "models", "pull", "small", "--encoder", tmp_path)
    assert (code, err) == (1, "Error: small takes no --encoder: leave it out\n")


def test_an_unknown_model_is_one_line(capsys):
    code, out, err = psd(capsys, "models", "pull", "nothing")
    assert (code, out) == (1, "")
    assert err.startswith(
        "Error: no published model is called 'nothing'; there are ssl-ldm-brca, hipt, zoomldm-brca"
    )


def test_the_published_models_are_where_they_should_be():
    assert [source.name for source in SOURCES] == ["ssl-ldm-brca", "hipt", "zoomldm-brca"]
    for source in SOURCES:
        for file in source.files:
            assert (file.remote is None) != (file.drive is None)
            if file.remote is not None:
                assert check_url(file.remote.url).startswith("https://")
            if file.drive is not None:
                check_drive_id(file.drive[0])
        roles = {file.role for file in source.files}
        by_hand = {"encoder"} if source.encoder_config else set()
        assert not source.bundle or roles | by_hand == {"ldm", "project", "encoder"}
    assert "Commons Clause, non-commercial" in SOURCES[0].terms.text
    assert "no licence file published" in SOURCES[0].terms.text
    assert "licence: MIT" in SOURCES[2].terms.text
    assert SOURCES[2].ema and SOURCES[2].encoder_config in NAMED_ENCODERS
    assert "needs --cond none" in SOURCES[2].note and "--encoder" in SOURCES[2].note


# --- what is seen


def test_progress_of_bytes_has_amount_rate_and_time_left(monkeypatch, capsys):
    now = iter([100.0, 102.0, 200.0, 200.0])
    monkeypatch.setattr("cli.progress.time.monotonic", lambda: next(now))
    monkeypatch.setattr("cli.progress._PLAIN_INTERVAL", 1.0)
    with TransferProgress() as progress:
        for done in (1_000_000, 3_000_000):
            progress.show(State(label="x.zip", unit="bytes", done=done, total=10_000_000))
        progress.show(State(label="y", unit="bytes", done=5_000, total=None))
    assert capsys.readouterr().err.splitlines() == [
        "x.zip: 1 MB of 10 MB, unknown time left",
        "x.zip: 3 MB of 10 MB, 1 MB/s, 7.0 s left",
        "y: 5 kB",
    ]


def test_progress_of_other_things_looks_as_before(capsys):
    with Progress("check", "images") as progress:
        progress(3, 3)
    assert capsys.readouterr().err == "check: 3/3 images\n"


def test_the_commands_show_an_example(capsys):
    for command in (("data", "fetch"), ("models", "pull")):
        code, out, _ = psd(capsys, *command, "--help")
        assert code == 0
        assert f"psd {' '.join(command)}" in out.split("Example:")[1]
