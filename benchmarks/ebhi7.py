"""Make the seven-class stand-in for BCSS: EBHI-Seg's glands, painted with their diagnosis.

    python benchmarks/ebhi7.py --ebhi ~/EBHI --out ~/ebhi7
    psd reproduce table2 --dataset ~/ebhi7/ebhi7.toml --model tiny --folds 0,1,2,3 --seeds 0

300 training images of the data set ebhi (CC BY 4.0): background and six diagnoses, at most 8 images
of a case, as even as there are images, case by case in an order by a hash. It is not BCSS: a
diagnosis is of the whole image, so a network may learn it from anywhere in it. Four folds by case.
"""

import argparse
import csv
import hashlib
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from pathsegdiff.data.image import read_label_image
from pathsegdiff.data.manifest import open_dataset
from pathsegdiff.data.manifest_file import Source
from pathsegdiff.evaluation.overlays import PALETTE
from pathsegdiff.evaluation.pictures import save_mask

DIAGNOSES = (
    "normal",
    "polyp",
    "low_grade_in",
    "high_grade_in",
    "serrated_adenoma",
    "adenocarcinoma",
)
IMAGES, FOLDS, SEED = 300, 4, 0
#: Of a case and diagnosis.
MOST = 8
BACKGROUND = (230, 230, 230)
COLUMNS = ("sample_id", "image", "mask", "split", "group", "diagnosis", "fold")
TOML = """name = "ebhi7"
title = "EBHI-Seg, 300 images, glands painted with six diagnoses (a stand-in, not BCSS)"
licence = "CC BY 4.0"
citation = "Shi L, Li X, Hu W, et al. Frontiers in Medicine 10 (2023) 1114673."
root = "."
splits = ["train"]
grouped = true

[region]
kind = "resize"
region_px = 512

[labels]
classes = [
{classes}
]
"""


def choose(sources: list[Source]) -> list[Source]:
    """``IMAGES`` of them: every image of the rarest diagnoses, as many of each other."""
    by_diagnosis: dict[str, list[Source]] = {name: [] for name in DIAGNOSES}
    taken: Counter[tuple[str, str]] = Counter()
    for source in sorted(sources, key=lambda one: one.image):
        diagnosis = source.extra["diagnosis"]
        taken[source.group, diagnosis] += 1
        if taken[source.group, diagnosis] <= MOST:
            by_diagnosis[diagnosis].append(source)
    chosen: list[Source] = []
    rarest_first = sorted(DIAGNOSES, key=lambda name: (len(by_diagnosis[name]), name))
    for done, name in enumerate(rarest_first):
        quota = -(-(IMAGES - len(chosen)) // (len(DIAGNOSES) - done))
        ordered = sorted(
            by_diagnosis[name],
            key=lambda one: (hashlib.sha256(f"{SEED}:{one.group}".encode()).digest(), one.image),
        )
        chosen += ordered[:quota]
    return sorted(chosen, key=lambda one: one.image)


def folds_of(chosen: list[Source]) -> dict[str, int]:
    """Fold of each case, largest case first: where its diagnoses have fewest images so far."""
    cases: dict[str, Counter[str]] = defaultdict(Counter)
    for source in chosen:
        cases[source.group][source.extra["diagnosis"]] += 1
    have = [Counter[str]() for _ in range(FOLDS)]
    found = {}
    for case in sorted(cases, key=lambda case: (-cases[case].total(), case)):
        counts = cases[case]
        fold = min(
            range(FOLDS),
            key=lambda number: (
                sum(have[number][name] * count for name, count in counts.items()),
                have[number].total(),
            ),
        )
        have[fold].update(counts)
        found[case] = fold
    return found


def main() -> None:
    """Write masks, images and the manifest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ebhi", type=Path, required=True, help="folder with dev/")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    arguments = parser.parse_args()
    dataset = open_dataset("ebhi", data_root=arguments.ebhi, splits=("train",))
    chosen = choose([one for one in dataset.manifest.sources if one.split == "train"])
    folds = folds_of(chosen)
    colours = (BACKGROUND, *PALETTE[: len(DIAGNOSES)])
    rows = []
    for source in chosen:
        diagnosis = source.extra["diagnosis"]
        glands = read_label_image(arguments.ebhi / source.mask) > 0
        painted = np.where(glands, 1 + DIAGNOSES.index(diagnosis), 0).astype(np.uint8)
        image = Path("images") / f"{source.source_id}{Path(source.image).suffix}"
        mask = Path("masks") / f"{source.source_id}.png"
        for path in (image, mask):
            (arguments.out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(arguments.ebhi / source.image, arguments.out / image)
        save_mask(arguments.out / mask, painted, colours)
        names = source.source_id, str(image), str(mask), "train", source.group, diagnosis
        rows.append((*names, folds[source.group]))
    with (arguments.out / "ebhi7.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
    lines = [
        f'  {{ name = "{name}", colour = {list(colour)}, codes = [{code}] }},'
        for code, (name, colour) in enumerate(zip(("background", *DIAGNOSES), colours, strict=True))
    ]
    (arguments.out / "ebhi7.toml").write_text(TOML.replace("{classes}", "\n".join(lines)))
    counts = Counter((row[-1], row[-2]) for row in rows)
    print("images of", *(f"fold {fold}" for fold in range(FOLDS)), sep="\t")
    for name in DIAGNOSES:
        print(name, *(counts[fold, name] for fold in range(FOLDS)), sep="\t")


if __name__ == "__main__":
    main()
