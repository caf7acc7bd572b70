"""What a bundle's autoencoder keeps of an image: PSNR in dB, over all images of a split together.

python benchmarks/reconstruction.py --dataset demo --size 448
python benchmarks/reconstruction.py --dataset glas --data-root GLAS --split train
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.data.regions import cut_patches, resize_image
from pathsegdiff.device import resolve_device
from pathsegdiff.diffusion.bundle import load_bundle
from pathsegdiff.diffusion.pretrain.autoencoder import reconstruct


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--split", action="append", default=[])
    parser.add_argument("--size", type=int, help="resize each region to this, uncut")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    bundle = load_bundle(options.model)
    model = bundle.load(device=device)
    dataset = open_dataset(options.dataset, data_root=options.data_root, splits=options.split)
    errors = []
    for sample in dataset.samples:
        image = dataset.read(sample).image
        if options.size is None:
            patches = cut_patches(image, bundle.card.patch_px)
        else:
            patches = resize_image(image, (options.size, options.size))[None]
        squared = [squared_error(model.autoencoder, patch, device) for patch in patches]
        errors.append(statistics.mean(squared))
    figures = {
        "model": bundle.card.name,
        "images": len(errors),
        "psnr": psnr(statistics.mean(errors)),
        "worst_image": psnr(max(errors)),
        "best_image": psnr(min(errors)),
    }
    print(json.dumps(figures, indent=2))


@torch.inference_mode()
def squared_error(autoencoder: torch.nn.Module, patch: np.ndarray, device: torch.device) -> float:
    """Mean squared error of one image in [0, 1], (H, W, 3) uint8."""
    image = torch.from_numpy(np.ascontiguousarray(patch)).permute(2, 0, 1)[None].float() / 255
    image = image.to(device)
    return (reconstruct(autoencoder, image) - image).square().mean().item()


def psnr(error: float) -> float:
    """In dB, of a mean squared error in [0, 1]."""
    return round(-10 * math.log10(max(error, 1e-12)), 2)


if __name__ == "__main__":
    main()
