"""Is a store whole: every file of every complete sample against its completion mark."""

import zlib
from dataclasses import dataclass

import dask

from pathsegdiff.errors import StoreError
from pathsegdiff.features.store import FeatureStore, StoredSample, row_key


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong with a sample."""

    sample: StoredSample
    problem: str


def verify_store(store: FeatureStore) -> list[Finding]:
    """Read every byte of every complete sample; the samples run side by side through dask.

    Returns:
        What is wrong, in the order of the samples; empty for a store that is whole.

    Raises:
        StoreError: If an array of the store itself is missing or damaged: no sample can mend that.
    """
    store.check_arrays()
    samples = store.samples()
    checks = [dask.delayed(verify_sample)(store, sample) for sample in samples]
    results = dask.compute(*checks, scheduler="threads")
    return [finding for result in results for finding in result]


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
