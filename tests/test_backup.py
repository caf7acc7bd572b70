"""The second copy of a store's metadata: its limits."""

import pytest

from pathsegdiff.features import backup
from pathsegdiff.features.seal import sealed
from pathsegdiff.features.store import MAX_TABLE_BYTES


@pytest.mark.parametrize("text", ["plain", '"' * 9, "\\\n\t" * 9, "é\u2028\U0001f52c" * 9])
def test_the_copy_of_the_largest_table_is_no_larger_than_what_is_read(text):
    rows = [{"sample_id": f"{text}{number}", "group": text} for number in range(1000)]
    table = sealed({"files": {}, "samples": rows}, indent=0)
    copy = sealed({"files": {"samples.json": table.decode()}}, indent=0)
    assert len(copy) <= len(table) * backup._MAX_BYTES / MAX_TABLE_BYTES
