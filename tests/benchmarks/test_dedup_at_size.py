"""The measurement of docs/duplicates.md, small: made-up sets have duplicates that are found, and the search holds little."""

import pytest


def test_planted_copies_are_found_by_lists_and_nothing_else_is_left_out(monkeypatch):
    pytest.importorskip("faiss")
    from ssl_locat.benchmarks import dedup
    from ssl_locat.data.stream import duplicates

    monkeypatch.setattr(duplicates, "MOST_PAIRS", 4e9)  # put back after the measurement, which lowers it
    monkeypatch.setattr(duplicates, "MOST_IN_MEMORY", 500)  # thumbnails in a file
    found = dedup.measure(3000)
    assert found["planted"] == 29 and found["planted_found"] >= 28
    assert found["left_out"] <= found["planted"] + 1 and found["pairs"] < 60
    assert found["peak_mb"] - found["peak_mb_before"] < 200
