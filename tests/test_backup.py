"""The second copy of a store's metadata: its limits, and whether it is behind."""

import pytest

from pathsegdiff.features import backup
from pathsegdiff.features.seal import sealed
from pathsegdiff.features.store import MAX_TABLE_BYTES, FeatureStore
from tests.helpers_store import build_store


@pytest.mark.parametrize("text", ["plain", '"' * 9, "\\\n\t" * 9, "é\u2028\U0001f52c" * 9])
def test_the_copy_of_the_largest_table_is_no_larger_than_what_is_read(text):
    rows = [{"sample_id": f"{text}{number}", "group": text} for number in range(1000)]
    table = sealed({"files": {}, "samples": rows}, indent=0)
    copy = sealed({"files": {"samples.json": table.decode()}}, indent=0)
    assert len(copy) <= len(table) * backup._MAX_BYTES / MAX_TABLE_BYTES


def test_a_copy_that_a_writer_is_about_to_renew_is_not_older(tmp_path, monkeypatch):
    stored = tmp_path / "s.zarr"
    build_store(stored)
    older = sealed({"files": {"samples.json": "{}"}})
    content = (stored / "backup.json").read_bytes()
    (stored / "backup.json").write_bytes(older)

    def renew(seconds):
        assert 0 < seconds < 5
        (stored / "backup.json").write_bytes(content)

    monkeypatch.setattr(backup.time, "sleep", renew)
    store = FeatureStore.open(stored)
    assert not backup.copy_is_older(store)
    monkeypatch.setattr(backup.time, "sleep", lambda seconds: None)
    (stored / "backup.json").write_bytes(older)
    assert backup.copy_is_older(store)
    assert backup.copy_problem(store) is None
