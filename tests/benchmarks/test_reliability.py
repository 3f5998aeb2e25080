"""`ssl-locat bench reliability`: it counts what it says it counts, and one real pass of ours, killed and resumed with other sizes."""

import json
import os
import ssl
import tarfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from ssl_locat.benchmarks.reliability import episodes, samples, scoreboard, tables
from ssl_locat.benchmarks.reliability.cells import CELLS, SAMPLES
from ssl_locat.benchmarks.reliability.samples import Job
from ssl_locat.benchmarks.reliability.server import EVERY, failing
from ssl_locat.errors import UserError


def test_samples_that_are_lost_repeated_or_wrong_are_counted():
    expected = Counter(range(100))
    numbers = [*range(1, 100), 5, 5, 7]
    assert episodes.count(CELLS["kill"], numbers, expected) == {"expected": 100, "lost": 1, "repeated": 3, "corrupt_delivered": 0}
    bad = [number for number in range(100) if samples.is_corrupt(number, 0.01)]
    assert len(bad) == 1
    told = episodes.count(CELLS["corrupt"], [*range(100)], expected)
    assert told == {"expected": 99, "lost": 0, "repeated": 0, "corrupt_delivered": 1}
    batch = samples.batch(samples.seen(one.number, samples.decoded(one.png), one.label) for one in samples.make(4))
    assert samples.wrong(batch) == 0
    batch["checksum"][1], batch["label"][2] = 0, 11
    assert samples.wrong(batch) == 2
    with pytest.raises(OSError):
        samples.decoded(next(samples.make(1, bad[0], 0.01)).png)


def test_what_lies_behind_the_newest_common_state_counts_and_no_more(tmp_path):
    job = Job([], [], 0, 2, 0, 4, 8, 4, 0, None, tmp_path)
    for rank, steps in enumerate((5, 3)):
        lines = [json.dumps([step, [10 * step + rank], step == 1, 0.5]) for step in range(1, steps + 1)]
        (tmp_path / f"seen.{rank}.jsonl").write_text("\n".join(lines) + "\n[9, [99")
        for step in range(2, steps + 1, 2):
            (tmp_path / f"state.{rank}.{step}").touch()
    (tmp_path / "state.1.4.partial").touch()
    (tmp_path / "output.0.txt").write_text("UserWarning: it breaks")
    killed = episodes._harvest(job, None)
    assert killed.steps == 2 and sorted(killed.numbers) == [10, 11, 20, 21] and killed.wrong == 2 and killed.output
    assert [path.name for path in killed.states] == ["state.0.2", "state.1.2"] and killed.first == 0.5
    assert episodes._harvest(job, "ended").steps == 5


def test_every_twentieth_answer_fails(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1000))
    with failing(tmp_path, "503") as url:
        codes = []
        for _ in range(EVERY):
            try:
                codes.append(urllib.request.urlopen(f"{url}/file").status)
            except urllib.error.HTTPError as error:
                codes.append(error.code)
        request = urllib.request.Request(f"{url}/file", headers={"Range": "bytes=10-19"})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 206 and len(answer.read()) == 10
    assert Counter(codes) == {200: EVERY - 1, 503: 1}


def test_clients_that_take_https_alone_are_served(tmp_path, monkeypatch):
    for name in ("SSL_CERT_FILE", "AWS_CA_BUNDLE"):
        monkeypatch.setenv(name, "")  # set again after the test
    (tmp_path / "file").write_bytes(bytes(1000))
    with failing(tmp_path, "", secure=True) as url:
        context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
        with urllib.request.urlopen(f"{url}/file", context=context) as answer:
            assert url.startswith("https:") and len(answer.read()) == 1000


def test_a_pass_that_stopped_counts_no_samples():
    row = {"passes": 0, "bad_passes": 0, "stops": {}, "output": [], "first": []}
    played = {"episodes": 2, "kills": 1, "wrong": 0, "first": [], "stopped": None, "output": set()}
    counted = {"expected": 100, "lost": 4, "repeated": 0, "corrupt_delivered": 0}
    episodes._add(row, played, dict(counted))
    episodes._add(row, played | {"stopped": "OSError: no  space"}, dict(counted))
    assert (row["passes"], row["bad_passes"], row["expected"], row["lost"], row["episodes"]) == (2, 2, 100, 4, 4)
    assert row["stops"] == {"OSError: no space": 1} and row["hangs"] == 0


def test_a_shard_is_cut_in_a_sample_or_between_two(tmp_path):
    for where in ("middle", "border"):
        samples.write_tars(tmp_path / where, samples.make(3 * samples.PER_SHARD))
        samples.cut(tmp_path / where, ".tar", where)
        sizes = [path.stat().st_size for path in sorted((tmp_path / where).glob("*.tar"))]
        assert sizes[1] < sizes[0] == sizes[2] and (sizes[1] % 512 == 0) == (where == "border")
    with tarfile.open(tmp_path / "border/00001.tar") as archive:
        assert len(archive.getnames()) == sizes[1] // 1024 == 50  # 25 of 48 samples, two files each, two blocks a file


def test_cells_are_chosen_by_name():
    assert scoreboard.chosen(["webdataset:border"]) == [("webdataset", "border")]
    assert {cell for _, cell in scoreboard.chosen([":cut"])} == {"cut"} and len(scoreboard.chosen([])) > 40
    with pytest.raises(UserError, match="--only webdatasets: expected PEER"):
        scoreboard.chosen(["webdatasets"])


def test_results_are_told_in_tables():
    row = {"peer": "grain", "cell": "kill", "passes": 2, "episodes": 10, "expected": 2000, "lost": 1, "repeated": 4, "wrong": 0}
    row |= {
        "hangs": 0,
        "stops": {},
        "told": False,
        "first_batch_seconds": 0.25,
        "kills": 8,
        "corrupt_delivered": 0,
        "date": "2026-11-30",
    }
    rows = [row, row | {"cell": "cut", "stops": {"OSError: no": 2}}, row | {"cell": "border"}]
    table = tables.summary(rows)
    assert "| 0.5 / 2 / 0 (n = 10) |" in table and "2 of 2 passes ended with an error (n = 10)" in table
    assert "0.5 / 2 / 0, nothing said (n = 10)" in table  # of damage; that a resume loses some is written in the documentation
    assert "| 0.25 |" in table
    assert "| `grain:kill` | 10 | 8 | 2000 | 1 | 4 | 0 | 0 | 0 | 0 | no | 0.25 | 2026-11-30 |" in tables.details(rows)
    assert "- `grain:cut`: `OSError: no`" in tables.stops(rows) and "- grain: not promised" in tables.stops(rows)
    page = f"above\n{tables.BEGIN}former text\n{tables.END}below\n"
    filled = tables.fill(page, rows)
    assert (
        filled.startswith("above\n")
        and filled.endswith("below\n")
        and "former text" not in filled
        and tables.summary(rows, tables.others()) in filled
    )
    assert tables.fill(filled, rows) == filled
    assert {"ours", "grain"} <= set(tables.others()) and "huggingface_unshuffled" not in tables.others()


def test_peers_are_pinned_and_say_what_they_promise_and_why_a_cell_is_empty():
    for peer, about in scoreboard.PEERS.items():
        assert set(about) - {"otherwise"} == {"title", "requires", "promises", "link", "cells"}
        assert all("==" in pin for pin in about["requires"]) and (about["requires"] or peer.startswith("ours"))
        empty = about.get("otherwise", {})
        assert {*about["cells"], *empty} == set(CELLS) and not set(about["cells"]) & set(empty), peer
        assert all(why.startswith(("not promised, ", "not meant for it, ")) for why in empty.values())


def test_the_tables_of_the_page_are_those_of_the_results():
    docs = Path(__file__).parents[2] / "docs"
    rows, page = tables.read(docs / "reliability.jsonl"), (docs / "reliability.md").read_text(encoding="utf-8")
    assert tables.fill(page, rows) == page, "make them anew, by the command that the page names"
    assert all(row["cell"] in scoreboard.PEERS[row["peer"]]["cells"] for row in rows)
    kills = [row for row in rows if row["peer"] == "ours" and row["cell"] in ("kill", "world", "workers", "mix")]
    assert all(row["lost"] == row["repeated"] == row["wrong"] == row["hangs"] == 0 and not row["stops"] for row in kills)


def test_a_pass_of_ours_is_exact_however_it_is_killed(tmp_path):
    began = time.time()
    rows = scoreboard.scoreboard(tmp_path, ["ours:world"], install=False, quick=True)["rows"]
    (row,) = rows
    assert (row["lost"], row["repeated"], row["wrong"], row["hangs"], row["stops"]) == (0, 0, 0, 0, {}), row
    assert row["expected"] == SAMPLES and row["kills"] == 9 and row["episodes"] == 10
    assert 0 < row["first_batch_seconds"] < time.time() - began
    # what has a result is not measured again, unless it is asked for by name
    assert tables.read(tmp_path / "results.jsonl") == rows
