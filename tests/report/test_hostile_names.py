"""Names that came from elsewhere do nothing to a chart, a page, a log or a terminal; the served page waits for nobody."""

import io
import json
import logging
import socket
import sys
import threading
import time

import pytest

from ssl_locat.data.shards.check import Report
from ssl_locat.data.shards.tar import Damage
from ssl_locat.errors import DataError
from ssl_locat.report import live, page
from ssl_locat.report.charts import Chart, Line, Mark
from ssl_locat.runs import log as run_log

HOSTILE = "a$x^$b\x1b[31m\u202egpj\r\n12:00:00 ERROR forged</text><script>alert(1)</script>"


def test_a_chart_shows_names_as_they_stand():
    lines = [Line(HOSTILE, [1, 2], [1, 2]), Line("price $5$", [1, 2], [2, 1])]
    data = Chart("c", "", lines, HOSTILE, unit="$", marks=[Mark(1, HOSTILE)], level=(1, HOSTILE)).data()
    texts = [data["lines"][0]["label"], data["xlabel"], data["marks"][0]["label"], data["level"]["label"]]
    assert all(text.startswith("a$x^$b\\x1b[31m\\u202egpj\\x0d\\n12:00:00 ERROR forged</text>") for text in texts)
    assert data["lines"][1]["label"] == "price $5$"


def test_a_page_shows_what_cannot_be_printed_by_its_number(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run_dir: run\ndata: {train: 'https://me:hunter2@host/a.tar?sig=hunter2'}\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "samples_seen": 4, "time": 1.0, HOSTILE: 1.5}) + "\n")
    entry = {"position": 0, "dataset": HOSTILE, "index": 0, "shard": HOSTILE, "key": HOSTILE, "error": HOSTILE}
    (run / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    (run / "events.jsonl").write_text(
        json.dumps({"time": "2026-11-29T00:00:00", "kind": "warning", "step": 1, "message": HOSTILE}) + "\n"
    )
    page.write([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "\x1b" not in text and "\u202e" not in text and "<script>alert" not in text and "hunter2" not in text
    assert "\\x1b[31m\\u202egpj" in text


def test_a_log_line_stays_one_line(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    run_log.setup()
    logging.getLogger("ssl_locat.test").warning("%s is damaged: %s", HOSTILE, ValueError(HOSTILE))
    (line,) = stream.getvalue().splitlines()
    assert "\\x1b[31m" in line and "\\n12:00:00 ERROR forged" in line and "\x1b" not in line


def test_errors_and_reports_of_damage_show_names_escaped():
    assert "\x1b" not in str(DataError(f"{HOSTILE} is wrong")) and "\u202e" not in str(DataError(HOSTILE))
    text = str(Report(shards=1, damage=[Damage(HOSTILE, HOSTILE, HOSTILE)]))
    assert len(text.splitlines()) == 3 and "\x1b" not in text


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "SILENCE", 0.5)
    monkeypatch.setattr(live, "CONNECTIONS", 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run_dir: run\n")
    server = live.make_server([tmp_path / "run"])
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def version(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET /version HTTP/1.0\r\nHost: localhost\r\n\r\n")
        return client.makefile("rb").readline()


def test_silent_and_many_clients_are_left(served, capfd):
    silent = [socket.create_connection(("127.0.0.1", served), timeout=20) for _ in range(3)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", served), timeout=20) as fourth:
        assert fourth.recv(1) == b""  # hung up at once: three are served
    assert [client.recv(1) for client in silent] == [b""] * 3  # after the time-out
    assert b"200" in version(served)
    for client in silent:
        client.close()
    with socket.create_connection(("127.0.0.1", served)) as leaving:  # asks for the page, and leaves
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        leaving.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    time.sleep(0.5)
    assert b"200" in version(served)
    assert "Traceback" not in capfd.readouterr().err
