"""Choose the training images of data_manifests/ebhi300.csv from those of ebhi.csv.

    python benchmarks/choose_ebhi300.py [--out data_manifests/ebhi300.csv]

Whole cases in an order by a hash of (seed, attempt, case); one is taken where none of its diagnoses
then exceeds its share of the 300 images. The first attempt that ends with exactly 300, every
diagnosis within one image of its share, is written with all test images, in the order of ebhi.csv.
"""

import argparse
import csv
import hashlib
from collections import Counter
from pathlib import Path

MANIFESTS = Path(__file__).parents[1] / "data_manifests"
IMAGES = 300
SEED = 0
#: A diagnosis may be so many images off its share: whole cases rarely meet it exactly.
SLACK = 1


def shares(rows: list[dict[str, str]]) -> Counter[str]:
    """Images of each diagnosis in proportion, rounded to ``IMAGES`` by the largest remainder."""
    counts = Counter(row["diagnosis"] for row in rows)
    exact = {name: IMAGES * count / len(rows) for name, count in counts.items()}
    found = Counter({name: int(share) for name, share in exact.items()})
    by_remainder = sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))
    found.update(by_remainder[: IMAGES - found.total()])
    return found


def choose_cases(rows: list[dict[str, str]]) -> set[str]:
    """Cases whose images are ``IMAGES`` together."""
    wanted = shares(rows)
    cases: dict[str, Counter[str]] = {}
    for row in rows:
        cases.setdefault(row["group"], Counter())[row["diagnosis"]] += 1
    attempt = 0
    while True:
        order = sorted(
            cases,
            key=lambda case: hashlib.sha256(f"{SEED}:{attempt}:{case}".encode()).digest(),
        )
        chosen: set[str] = set()
        have: Counter[str] = Counter()
        for case in order:
            after = have + cases[case]
            if after.total() <= IMAGES and all(
                after[name] <= wanted[name] + SLACK for name in after
            ):
                chosen.add(case)
                have = after
        close = all(abs(have[name] - share) <= SLACK for name, share in wanted.items())
        if have.total() == IMAGES and close:
            print(f"attempt {attempt}: {len(chosen)} cases, {dict(have.most_common())}")
            return chosen
        attempt += 1


def main() -> None:
    """Write the CSV and print what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=MANIFESTS / "ebhi300.csv")
    out = parser.parse_args().out
    with (MANIFESTS / "ebhi.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["split"] == "train"]
    print(f"shares: {dict(shares(train).most_common())}")
    cases = choose_cases(train)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if row["split"] == "test" or row["group"] in cases)


if __name__ == "__main__":
    main()
