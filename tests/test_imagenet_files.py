"""ImageNet weights from where torchvision has them: got, checked, kept, refused."""

import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cli.main import run
from pathsegdiff.errors import FetchError, RunError
from pathsegdiff.fetch import download as transfers
from pathsegdiff.pipeline.baselines import imagenet_files
from pathsegdiff.pipeline.baselines.imagenet_files import (
    describe_weights,
    fetch_imagenet,
    imagenet_file,
)
from pathsegdiff.pipeline.baselines.networks import build_network
from tests.helpers_http import serving
from tests.helpers_stage_one import write_dataset


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server in the place of torchvision's, and a folder in the place of torch's."""
    pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.setattr(transfers, "RETRIES", 0)
    monkeypatch.setattr(transfers, "_PAUSE_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with serving() as served:
        yield served


def publish(server, monkeypatch, content: bytes, *, named: bytes | None = None, **more) -> str:
    """Serve a file under the name that its content (or another's) gives it."""
    digest = hashlib.sha256(content if named is None else named).hexdigest()[:8]
    address = server.put(f"/models/resnet18-{digest}.pth", content, **more)
    monkeypatch.setattr("torchvision.models.get_weight", lambda name: SimpleNamespace(url=address))
    return f"resnet18-{digest}.pth"


def weights() -> bytes:
    buffer = io.BytesIO()
    torch.save(build_network("res-unet", 2, seed=5).encoder.state_dict(), buffer)
    return buffer.getvalue()


def test_torchvision_has_the_addresses():
    pytest.importorskip("segmentation_models_pytorch")
    names = {encoder: imagenet_file(encoder).name for encoder in imagenet_files._WEIGHTS}
    assert names == {"resnet18": "resnet18-f37072fd.pth", "vgg16_bn": "vgg16_bn-6c64b313.pth"}
    with pytest.raises(RunError, match="of resnet18, vgg16_bn, not of resnet50"):
        imagenet_file("resnet50")


def test_a_file_is_got_once_and_continued_where_it_broke_off(server, monkeypatch, tmp_path):
    content = bytes(range(256)) * 10_000
    name = publish(server, monkeypatch, content, breaks_after=1_500_000)
    with pytest.raises(FetchError, match="ImageNet weights of resnet18 cannot be had .*again"):
        fetch_imagenet("resnet18")
    seen = []
    file = fetch_imagenet("resnet18", on_bytes=lambda *state: seen.append(state))
    assert file == tmp_path / "torch/hub/checkpoints" / name == imagenet_file("resnet18")
    assert file.read_bytes() == content
    assert seen[-1] == (len(content), len(content))
    assert [path.name for path in file.parent.iterdir()] == [name]
    asked = server.ranges(f"/models/{name}")
    assert asked[0] == "" and asked[-1].startswith("bytes=")
    assert fetch_imagenet("resnet18") == file
    assert server.ranges(f"/models/{name}") == asked


def test_another_file_than_its_name_says_is_never_taken(server, monkeypatch):
    publish(server, monkeypatch, b"altered" * 1000, named=b"as published")
    with pytest.raises(FetchError, match=r"sha256 \w{8}\) and is removed"):
        fetch_imagenet("resnet18")
    folder = imagenet_file("resnet18").parent
    assert not list(folder.iterdir())
    imagenet_file("resnet18").write_bytes(b"damaged since")
    with pytest.raises(FetchError, match="was damaged"):
        fetch_imagenet("resnet18")
    assert not list(folder.iterdir())


def test_a_refusal_names_the_way_on(server, monkeypatch):
    publish(server, monkeypatch, b"", status=404)
    with pytest.raises(FetchError, match="404.*give --encoder-weights a file of them, or leave it"):
        fetch_imagenet("resnet18")


def test_the_commands_begin_with_them_and_say_so(server, monkeypatch, tmp_path, capsys):
    name = publish(server, monkeypatch, weights())
    write_dataset(tmp_path / "data")
    data = ["--dataset", str(tmp_path / "data" / "discs.toml")]
    out = tmp_path / "run"
    short = ["--steps", "1", "--size", "64", "--val", "0", "--keep", "last", "--out", str(out)]
    command = ["baseline", "res-unet", *data, *short]
    assert run([*command, "--encoder-weights", "imagenet"]) == 0
    said = capsys.readouterr().out
    assert f"{name}, BSD 3-Clause" in said
    assert f'"file": "{name}"' in (out / "config.json").read_text()
    table = ["reproduce", "table4", *data, "--rows", "res-unet", "--out", str(tmp_path / "t")]
    given = ["--encoder-weights", "imagenet", "--table-only"]
    assert run([*table, *given]) == 0
    assert "Table 4 on discs" in capsys.readouterr().out
    assert run([*table, *given, "--encoder-weights", "resnet18=x.pth"]) == 2
    assert "given twice for resnet18" in capsys.readouterr().err
    imagenet_file("resnet18").unlink()
    publish(server, monkeypatch, b"", status=503)
    assert run([*table, "--encoder-weights", "imagenet"]) == 1
    assert "missing: ImageNet weights of resnet18 cannot be had" in capsys.readouterr().err


def test_auto_takes_them_where_they_can_be_had_and_else_begins_from_scratch(
    server, monkeypatch, tmp_path, capsys
):
    write_dataset(tmp_path / "data")
    data = ["--dataset", str(tmp_path / "data" / "discs.toml"), "--encoder-weights", "auto"]
    short = ["--steps", "1", "--size", "64", "--val", "0", "--keep", "last"]
    publish(server, monkeypatch, b"", status=503)
    command = ["baseline", "res-unet", *data, *short]
    assert run([*command, "--out", str(tmp_path / "scratch")]) == 0
    assert "cannot be had" in (said := capsys.readouterr().out)
    assert "it begins from scratch" in said
    table = ["reproduce", "table4", *data, "--rows", "res-unet", "--out", str(tmp_path / "t")]
    assert run([*table, "--table-only"]) == 0
    assert "U-Net with a ResNet-18 encoder, from scratch" in capsys.readouterr().out
    name = publish(server, monkeypatch, weights())
    assert run([*command, "--out", str(tmp_path / "had")]) == 0
    configs = [
        json.loads((tmp_path / run / "config.json").read_text()) for run in ("scratch", "had")
    ]
    scratch, had = (config["network"]["encoder_weights"] for config in configs)
    assert scratch == "none" and had["file"] == name
    capsys.readouterr()
    assert run([*table, "--table-only"]) == 0
    assert f"U-Net with a ResNet-18 encoder, encoder from {name}" in capsys.readouterr().out


def test_nothing_is_fetched_where_something_else_is_missing(server, monkeypatch, tmp_path, capsys):
    name = publish(server, monkeypatch, weights())
    table = ["reproduce", "table4", "--dataset", str(tmp_path / "absent.toml")]
    assert run([*table, "--rows", "res-unet", "--encoder-weights", "imagenet"]) == 1
    assert "missing: " in capsys.readouterr().err
    assert not server.ranges(f"/models/{name}")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (None, "from scratch"),
        ("vgg16_bn-6c64b313.pth", "ImageNet encoder, vgg16_bn-6c64b313.pth"),
        ("mine.pth", "encoder from mine.pth"),
    ],
)
def test_a_title_says_what_an_encoder_begins_with(file, said):
    assert describe_weights(None if file is None else Path(file)) == said
