"""Is a store whole: every file of every complete sample against its completion mark."""

import zlib
from dataclasses import dataclass
from functools import partial

from pathsegdiff.data.passes import iterate_threads
from pathsegdiff.errors import StoreError
from pathsegdiff.features.backup import copy_problem
from pathsegdiff.features.store import BACKUP_KEY, FeatureStore, StoredSample, row_key


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong with a sample, or with the store itself where there is none."""

    sample: StoredSample | None
    problem: str


def verify_store(store: FeatureStore) -> list[Finding]:
    """Read every byte of every complete sample, and the second copy of the metadata.

    The samples run side by side through dask.

    Returns:
        What is wrong, in the order of the samples; empty for a store that is whole.

    Raises:
        StoreError: If an array of the store itself is missing or damaged.
    """
    store.check_arrays()
    results = iterate_threads(partial(verify_sample, store), store.samples())
    findings = [finding for result in results for finding in result]
    problem = copy_problem(store)
    if problem is not None:
        findings.append(Finding(sample=None, problem=f"{BACKUP_KEY} {problem}"))
    return findings


def verify_sample(store: FeatureStore, sample: StoredSample) -> list[Finding]:
    """Hold one sample's files against the sizes and CRC-32 of its mark."""
    try:
        files = store.read_mark(sample)["files"]
    except StoreError as error:
        return [Finding(sample=sample, problem=str(error))]
    findings = [
        Finding(sample=sample, problem=f"the mark does not list {name}")
        for name, (shape, _) in store.array_shapes.items()
        if row_key(name, sample.index, len(shape)) not in files
    ]
    for key, (size, checksum) in files.items():
        there = store.size(key)
        if there is None:
            problem = "is missing"
        elif there != size:  # and is not read: it could be of any size
            problem = f"has {there} bytes instead of {size}"
        elif zlib.crc32(store.get(key) or b"") != checksum:
            problem = "has another checksum"
        else:
            continue
        findings.append(Finding(sample=sample, problem=f"{key} {problem}"))
    return findings
