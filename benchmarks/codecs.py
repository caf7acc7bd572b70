"""What each way of coding features costs: bytes, time to read, error. Stage 1's own arrays.

    python benchmarks/codecs.py --features features/glas-tiny-t50.zarr [--samples 4] [--json FILE]

Every sample is coded as the store would (chunks of some channels of a whole region), by float16 as
it is, float16 with its mantissa rounded to some bits, and int8 with a scale per channel and sample,
each followed by a lossless codec. Bytes are relative to plain float16. Decoding runs on one thread;
its rate counts the float16 bytes that come out.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc, Zstd, blosc

from pathsegdiff.features.quantize import dequantize, quantize, round_mantissa
from pathsegdiff.features.store import FeatureStore

CODECS: dict[str, Any] = {
    "none": None,
    "zstd 1": Zstd(1),
    "zstd 3": Zstd(3),
    "blosc zstd 1, bytes shuffled": Blosc("zstd", 1, Blosc.SHUFFLE),
    "blosc zstd 1, bits shuffled": Blosc("zstd", 1, Blosc.BITSHUFFLE),
    "blosc zstd 5, bits shuffled": Blosc("zstd", 5, Blosc.BITSHUFFLE),
    "blosc lz4, bits shuffled": Blosc("lz4", 5, Blosc.BITSHUFFLE),
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way of writing numbers.

    Attributes:
        code: (C, M, N) features to what is compressed.
        back: (C, M, N) features to what a reader would get of them.
    """

    code: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


def rounded(bits: int) -> Form:
    """float16 with a rounded mantissa."""
    return Form(
        code=lambda values: round_mantissa(values, bits),
        back=lambda values: round_mantissa(values, bits).astype(np.float32),
    )


FORMS = {
    "float16": Form(code=lambda values: values, back=lambda values: values.astype(np.float32)),
    "float16, 5 bits": rounded(5),
    "float16, 4 bits": rounded(4),
    "float16, 3 bits": rounded(3),
    "int8": Form(
        code=lambda values: quantize(values)[0], back=lambda values: dequantize(*quantize(values))
    ),
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    blosc.use_threads = False
    store = FeatureStore.open(options.features)
    samples = store.samples()
    chosen = [samples[i * len(samples) // options.samples] for i in range(options.samples)]
    maps = [store.read_level(sample, level) for sample in chosen for level in store.levels]
    plain = sum(values.nbytes for values in maps)
    table = []
    print("| numbers | codec | of float16's bytes | decoded, GB/s | relative error |")
    print("|---|---|---|---|---|")
    for name, form in FORMS.items():
        error = relative_error(maps, form)
        for codec_name, codec in CODECS.items():
            size, seconds = 0, 0.0
            for chunk in chunks(store, maps):
                coded = np.ascontiguousarray(form.code(chunk))
                content = coded.tobytes() if codec is None else codec.encode(coded)
                size += len(content)
                begin = time.perf_counter()
                bytearray(content) if codec is None else codec.decode(content)
                seconds += time.perf_counter() - begin
            rate = plain / seconds / 1e9
            table.append(
                {"numbers": name, "codec": codec_name, "bytes": size / plain, "rate": rate,
                 "error": error}
            )  # fmt: skip
            print(
                f"| {name} | {codec_name} | {size / plain:.3f} | {rate:.1f} | {error:.4f} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def chunks(store: FeatureStore, maps: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The chunks in which the store would write them."""
    side = store.patches_per_side
    levels = list(store.levels.values())
    for number, values in enumerate(maps):
        count = levels[number % len(levels)].chunk(side, side, values.itemsize)[0]
        for start in range(0, len(values), count):
            yield values[start : start + count]


def relative_error(maps: list[np.ndarray], form: Form) -> float:
    """Norm of the error over the norm of the features, all together."""
    lost = total = 0.0
    for values in maps:
        exact = values.astype(np.float32)
        lost += float(np.square(form.back(values) - exact).sum())
        total += float(np.square(exact).sum())
    return (lost / total) ** 0.5


if __name__ == "__main__":
    main()
