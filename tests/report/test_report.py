"""The report in a real browser, of a real run."""

import json
import re
import resource
import shutil
import threading
import urllib.error
import urllib.request

import pytest
import torch
from browser import open_browser
from trained import trained_run  # noqa: F401

from ssl_locat.errors import UserError
from ssl_locat.report.charts import MAX_POINTS, Line, Mark, chart
from ssl_locat.report.page import make_server, render, report, write
from ssl_locat.report.pictures import _Recorder
from ssl_locat.runs.history import flatten, open_run
from ssl_locat.runs.log import EventLog


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def two_runs(trained_run, tmp_path_factory):  # noqa: F811
    """The trained run, and a copy that was preempted, warned and quarantined, with another learning rate."""
    other = tmp_path_factory.mktemp("runs") / "other"
    shutil.copytree(trained_run, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("lr: 0.01", "lr: 0.02"))
    events = EventLog(other)
    events.add("preempt", step=4)
    events.add("resume", step=4)
    events.add("warning", step=8, message="Step 8: <script>alert('RankMe')</script> fell.", advice="More data.")
    (other / "quarantine.jsonl").write_text(
        json.dumps({"position": 3, "shard": "a.tar", "key": "k<1>", "reason": "cut off"}) + "\n"
    )
    return trained_run, other


PAGE_STATE = """
const images = [...document.images], figures = [...document.querySelectorAll('figure')];
return {
  figures: figures.length,
  titles: figures.map(f => f.querySelector('h3').textContent),
  drawn: [...document.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().width > 100),
  images: images.length,
  loaded: images.every(i => i.complete && i.naturalWidth > 0),
  alts: images.every(i => i.alt.length > 10) && [...document.querySelectorAll('[role=img]')].every(e => e.ariaLabel.length > 10),
  fetched: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).map(e => e.name),
  ids: (a => a.length - new Set(a).size)([...document.querySelectorAll('[id]')].map(e => e.id)),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  ground: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  axis: getComputedStyle(document.querySelector('figure svg text')).fill,
}
"""


def brightness(color: str) -> float:
    return sum(map(float, re.findall(r"\d+", color)[:3])) / 3


def test_the_page_works_in_a_browser(browser, two_runs):
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.resize(1300, 900)
    browser.open(report([str(two_runs[1])]).as_uri())
    state = browser.run(PAGE_STATE)
    assert browser.complaints() == []
    assert state["drawn"] and state["loaded"] and state["alts"] and state["fetched"] == [] and state["ids"] == 0
    wanted = {"Loss", "Teacher entropy and KL", "RankMe", "Learning rate", "Throughput", "Waiting for data", "knn: top1"}
    wanted |= {"Attention of the class token", "Attention of patches", "Patch features over the run", "Nearest neighbours"}
    assert wanted | {"What GAug learned"} <= set(state["titles"]) and state["images"] >= 4
    text = browser.run("return document.body.innerText")
    for part in ("Step 8: <script>alert('RankMe')</script> fell.", "More data.", "k<1>", "cut off", "preempt", "k-NN top-1"):
        assert part in text
    assert brightness(state["ground"]) > 200 and brightness(state["ink"]) < 80


def test_dark_mode_turns_charts_too(browser, two_runs):
    browser.open(report([str(two_runs[0])]).as_uri())
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    state = browser.run(PAGE_STATE)
    assert brightness(state["ground"]) < 60 and brightness(state["ink"]) > 180 and brightness(state["axis"]) > 180


def test_a_narrow_window_needs_no_sideways_scrolling(browser, two_runs):
    browser.resize(360, 700)
    browser.open(report([str(path) for path in two_runs], out=str(two_runs[1].parent / "both.html")).as_uri())
    assert browser.run(PAGE_STATE)["overflow"] <= 0


def test_the_keyboard_reaches_content_and_folds(browser, two_runs):
    browser.resize(1300, 900)
    browser.open(report([str(two_runs[0])]).as_uri())
    browser.press("\ue004")  # Tab
    assert browser.run("return document.activeElement.className") == "skip"
    browser.run("document.querySelector('#config').parentElement.querySelector('summary').focus()")
    browser.press(" ")
    assert browser.run("return document.querySelector('#config').parentElement.querySelector('details').open")


def test_several_runs_are_overlaid_and_their_configs_diffed(browser, two_runs):
    browser.open(report([str(path) for path in two_runs], out=str(two_runs[1].parent / "both.html")).as_uri())
    assert browser.complaints() == []
    table = browser.run("return document.querySelector('#differences').parentElement.innerText")
    assert "optim.lr" in table and "0.01" in table and "0.02" in table and "run_dir" not in table
    labels = browser.run("return [...document.querySelectorAll('figure svg text')].map(t => t.textContent)")
    assert {"run", "other", "run: top1_k5", "other: top1_k5"} <= set(labels)


def test_watching_shows_news_without_being_asked(browser, two_runs, tmp_path):
    run = tmp_path / "live"
    shutil.copytree(two_runs[0], run)
    server = make_server([run])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        browser.open(address)
        EventLog(run).add("warning", step=12, message="Something new happened.", advice="Look.")
        browser.send("POST", "/timeouts", {"script": 30000})
        script = """const done = arguments[arguments.length - 1];
            const look = () => document.body && document.body.innerText.includes('Something new') ? done(true) : setTimeout(look, 200); look();"""
        try:
            seen = browser.send("POST", "/execute/async", {"script": script, "args": []})
        except urllib.error.HTTPError:  # the page was loaded again while the script ran, which is what should happen
            seen = "Something new" in browser.run("return document.body.innerText")
        assert seen
        for wrong, code in ((address + "etc/passwd", 404), (address, 403)):
            request = urllib.request.Request(wrong, headers={"Host": "evil.example"} if code == 403 else {})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=10)
            assert refused.value.code == code
            refused.value.close()
    finally:
        server.shutdown()
        server.server_close()


def test_a_run_without_numbers_or_checkpoints_still_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    page = render([open_run(tmp_path)])
    assert "No numbers yet" in page and "What it sees" not in page


def test_missing_data_costs_the_pictures_only(trained_run, tmp_path):  # noqa: F811
    run = tmp_path / "moved"
    shutil.copytree(trained_run, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("/set/textures", "/gone/textures"))
    page = report([str(run)]).read_text()
    assert "Loss over step" in page and "Nearest neighbours" not in page


def test_wrong_arguments_are_the_users_mistake(tmp_path, trained_run):  # noqa: F811
    with pytest.raises(UserError, match="no config"):
        report([str(tmp_path)])
    with pytest.raises(UserError, match="--out"):
        report([str(trained_run)], out=str(tmp_path))
    with pytest.raises(UserError, match="port"):
        busy = make_server([trained_run])
        try:
            make_server([trained_run], busy.server_port)
        finally:
            busy.server_close()
    with pytest.raises(UserError, match=r"port 99999999 cannot be used \(.*0-65535"):
        make_server([trained_run], 99999999)


def test_a_full_disk_leaves_the_old_page_and_nothing_else(tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    (tmp_path / "report.html").write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write([tmp_path], tmp_path / "report.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "report.html"]
    assert (tmp_path / "report.html").read_text() == "before"


def test_long_curves_keep_their_extremes():
    values = [0.0] * 10_000
    values[5_000] = 7.0
    svg = chart("c", [Line("x", range(10_000), values)], xlabel="step", ylabel="y", marks=[Mark(10, "resume")])
    assert len(svg) < 60_000 and ">7" in svg and "resume" in svg and "#0000" not in svg and len(values) > MAX_POINTS


def test_recorded_attention_is_the_attention():
    q, k, v, mask = (torch.randn(2, 3, 5, 4) for _ in range(3)), None, None, torch.randn(2, 3, 5, 5)
    q, k, v = q
    with _Recorder() as recorder:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(recorder.weights[0] @ v, out)


def test_flatten_keeps_lists_whole():
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": 1}) == {"a.b": [1, 2], "a.c": {}, "d": 1}
