"""The report in a real browser, of a real run."""

import hashlib
import json
import re
import resource
import shutil
import threading
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from browser import open_browser
from trained import trained_run  # noqa: F401

import ssl_locat.objectives
from ssl_locat.config.schema import OBJECTIVES
from ssl_locat.config.yaml_files import load_yaml, names
from ssl_locat.errors import UserError
from ssl_locat.report.captions import NO_CURVES, TRAINING, score
from ssl_locat.report.charts import MAX_POINTS, Chart, Line, points_each
from ssl_locat.report.command import report
from ssl_locat.report.curves import curves
from ssl_locat.report.events import _saved, sentence
from ssl_locat.report.live import make_server
from ssl_locat.report.page import render, write
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
    events.add("preempt", step=4, signal="SIGTERM")
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
  titles: figures.map(f => f.querySelector('h3, h4').textContent),
  drawn: +document.documentElement.dataset.curves === document.querySelectorAll('.chart').length &&
    [...document.querySelectorAll('.chart')].every(c => c.querySelector('canvas')?.getBoundingClientRect().width > 100),
  captions: figures.every(f => f.querySelector('figcaption').innerText.length > 15),
  images: images.length,
  loaded: images.every(i => i.complete && i.naturalWidth > 0),
  alts: images.every(i => i.alt.length > 10) && [...document.querySelectorAll('[role=img]')].every(e => e.ariaLabel.length > 10),
  fetched: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).map(e => e.name),
  ids: (a => a.length - new Set(a).size)([...document.querySelectorAll('[id]')].map(e => e.id)),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  ground: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  axis: (() => {  // the brightest and the darkest of what is drawn opaque on the first canvas
    const c = document.querySelector('.chart canvas'), p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    const seen = [];
    for (let i = 0; i < p.length; i += 4) if (p[i + 3] > 200) seen.push((p[i] + p[i + 1] + p[i + 2]) / 3);
    return [Math.min(...seen), Math.max(...seen)];
  })(),
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
    assert state["captions"] and state["axis"][0] < 100
    wanted = {"Loss nats", "Teacher entropy nats", "RankMe dimensions", "Learning rate", "Throughput images/s", "k-NN: top-1 %"}
    wanted |= {"KL divergence nats", "Waiting for data share"}
    wanted |= {"Attention of the class token", "Attention of patches", "Patch features over the run", "Nearest neighbours"}
    wanted |= {"What it was trained on", "Images by their features", "knn: the commonest confusions", "Host memory GB"}
    wanted |= {"knn: top-1 of each class, the worst first k = 5", "Processors in use cores"}
    assert wanted | {"What GAug learned"} <= set(state["titles"]) and state["images"] >= 4
    text = browser.run("return document.body.innerText")
    for part in (
        "Step 8: <script>alert('RankMe')</script> fell.",
        "More data.",
        "k<1>",
        "cut off",
        "k-NN top-1",
        "Stopped by SIGTERM",
        "Warning at step 8: see the summary.",
    ):
        assert part in text
    assert brightness(state["ground"]) > 200 and brightness(state["ink"]) < 80


def test_dark_mode_turns_charts_too(browser, two_runs):
    browser.open(report([str(two_runs[0])]).as_uri())
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    state = browser.run(PAGE_STATE)
    assert brightness(state["ground"]) < 60 and brightness(state["ink"]) > 180 and state["axis"][1] > 150


LOSS = "[...document.querySelectorAll('figure')].find(f => f.querySelector('h4').textContent.startsWith('Loss'))"


def legend(browser, figure: str = LOSS) -> str:
    return browser.run(f"return {figure}.querySelector('.legend').innerText")


def test_values_show_under_the_pointer_and_a_drag_zooms(browser, two_runs):
    browser.resize(1300, 900)
    browser.open(report([str(two_runs[0])]).as_uri())
    browser.run(f"{LOSS}.querySelector('.u-over').id = 'loss'; document.querySelector('.u-over').id ||= 'first'; return 1")
    losses = {record["step"]: record["loss"] for record in open_run(two_runs[0]).metrics}
    assert legend(browser).split()[-1] == f"{losses[12]:.4g}"
    browser.point("#loss", 0.99)
    assert "step 12" in legend(browser) and f"{losses[12]:.4g}" in legend(browser)
    browser.point("#loss", 0.5)
    assert browser.run(f"return {LOSS}.querySelector('.u-cursor-pt').getBoundingClientRect().width") > 3  # the point itself
    shown = re.search(r"step (\d+)", legend(browser))
    assert shown and f"{losses[int(shown[1])]:.4g}" in legend(browser)
    entropy = LOSS.replace("Loss", "Teacher entropy")
    assert shown[0] in legend(browser, entropy)  # charts of one run are pointed at together
    assert browser.run("return document.querySelector('#whole').disabled")
    browser.point("#loss", 0.2, until=0.5)
    assert not browser.run("return document.querySelector('#whole').disabled")
    browser.point("#loss", 0.99)
    assert int(re.search(r"step (\d+)", legend(browser, entropy))[1]) < 8
    browser.run("document.querySelector('#whole').click()")
    browser.point("#loss", 0.99)
    assert "step 12" in legend(browser) and browser.complaints() == []


def test_a_dot_of_the_scatter_shows_its_image(browser, two_runs):
    browser.open(report([str(two_runs[0])]).as_uri())
    browser.run("const d = document.querySelectorAll('.scatter circle')[5]; d.id = 'dot'; d.parentElement.append(d)")
    assert browser.run("return document.querySelector('.tip').hidden")
    browser.point("#dot")
    assert not browser.run("return document.querySelector('.tip').hidden")
    assert browser.run("return getComputedStyle(document.querySelector('.sprite')).display") == "none"
    assert browser.run("return document.querySelector('.tip').innerText === document.querySelector('#dot').dataset.label")
    assert browser.run("return document.querySelectorAll('.scatter circle').length") == 40 and browser.complaints() == []


def test_a_folder_of_runs_is_a_table_to_sort(browser, two_runs, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(two_runs[0], runs / "a run, <b>bold</b>")
    shutil.copytree(two_runs[1], runs / "nested" / "é#1?")
    last = runs / "nested" / "é#1?" / "metrics.jsonl"
    record = json.loads(last.read_text().splitlines()[-1]) | {"step": 13, "loss": 99.5}
    last.write_text(last.read_text() + json.dumps(record) + "\n")
    (runs / "no run").mkdir()
    (runs / "broken").mkdir()
    (runs / "broken" / "config.yaml").write_text("a: [")
    (runs / "broken" / "events.jsonl").write_text("")
    page = report([str(runs)])
    assert page == runs / "report.html"
    browser.resize(1300, 900)
    browser.open(page.as_uri())
    losses = "return [...document.querySelectorAll('tbody tr')].map(r => r.cells[10].innerText)"
    first = browser.run(losses)
    assert len(first) == 2 and browser.run("return document.querySelector('tbody th').innerText") == "a run, <b>bold</b>"
    for order in (["99.5", min(first)], [min(first), "99.5"]):  # of numbers the largest first
        browser.run("document.querySelectorAll('thead button')[10].click()")
        assert browser.run(losses) == order
    assert browser.complaints() == []
    for index in range(2):
        link = browser.run(f"return document.querySelectorAll('tbody a')[{index}].href")
        browser.open(link)
        assert "· ssl_locat" in browser.run("return document.title") and browser.run("return !!document.querySelector('#curves')")
        browser.open(page.as_uri())
    with pytest.raises(UserError, match="--watch"):
        report([str(runs)], watch=True)
    with pytest.raises(UserError, match="below it"):
        report([str(runs)], out=str(tmp_path / "elsewhere.html"))


def test_smoothing_is_a_switch_that_lasts(browser, two_runs):
    browser.open(report([str(two_runs[0])]).as_uri())
    pixels = f"return {LOSS}.querySelector('canvas').toDataURL()"
    raw = browser.run(pixels)
    browser.run("document.querySelector('#smooth').click()")
    smooth = browser.run(f"return new Promise(done => setTimeout(() => done({pixels.removeprefix('return ')}), 200))")
    assert smooth != raw
    browser.open(browser.run("return location.href"))
    assert browser.run("return document.querySelector('#smooth').checked")
    browser.run("document.querySelector('#smooth').click()")
    browser.run(f"{LOSS}.querySelector('.curve').click()")
    assert browser.run(f"return {LOSS}.querySelector('.curve').ariaPressed") == "false" and browser.complaints() == []


def test_names_from_data_run_no_script(browser, tmp_path):
    """In the numbers that the page carries for its script, in the config, in names of metrics, probes and files."""
    evil = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
    run = tmp_path / "run"
    (run / "probes").mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps({"run_dir": "run", "data": {"train": evil}, "objective": {"name": evil}}))
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "samples_seen": s, "loss": 1.0, evil: 2.0}) + "\n" for s in (1, 2))
    )
    (run / "probes" / "a&lt;b.jsonl").write_text(json.dumps({"step": 1, evil: 3.0}) + "\n")
    (run / "events.jsonl").write_text(json.dumps({"time": evil, "kind": evil, "step": 1, "message": evil}) + "\n")
    classes = {
        "classes": [{"class": evil, "images": 1, "top1": 0.0}],
        "confusions": [{"class": evil, "taken_for": evil, "images": 1}],
    }
    (run / "probes" / "knn_classes.json").write_text(json.dumps(classes))
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    browser.open(report([str(run)]).as_uri())
    assert browser.run("return document.title") == "run · ssl_locat" and browser.complaints() == []
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert "</script><script>document.title" in browser.run(
        "return document.querySelector('.legend .curve ~ .curve, main').innerText"
    )


def test_the_page_and_its_library_are_small_and_as_published(two_runs):
    assert report([str(two_runs[0])]).stat().st_size < 3_000_000
    folder = files("ssl_locat").joinpath("report/uplot")
    for line in folder.joinpath("SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() == digest


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
    labels = browser.run("return [...document.querySelectorAll('.legend .curve span')].map(t => t.textContent)")
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
    (line,) = Chart("c", "", [Line("x", range(10_000), values)], "step").data()["lines"]
    assert (
        len(line["x"]) == len(line["y"]) == MAX_POINTS
        and max(line["high"]) == 7.0
        and (line["x"][0], line["x"][-1]) == (0, 9_999)
    )


def test_a_page_with_many_curves_stays_small():
    charts = [Chart("c", "", [Line("x", range(2_000), [index / 7 for index in range(2_000)])] * 20, "step")] * 20
    most = points_each(charts)
    assert len(json.dumps([chart.data(most) for chart in charts])) < 2_500_000


def test_ln_k_stands_on_every_recipe_with_prototypes(tmp_path):
    recipes = {name: config for name in names("configs/pretrain") for config in [load_yaml(name, "configs/pretrain").data]}
    seen = 0
    for name, config in recipes.items():
        objectives = config["objective"] if isinstance(config["objective"], list) else [config["objective"]]
        kinds = [objective["name"] for objective in objectives]
        several = len(kinds) > 1
        record = {"step": 1, "samples_seen": 1, "loss": 1.0, f"{'dino_' if several else ''}teacher_entropy": 1.0}
        record |= dict.fromkeys(kinds, 1.0) if several else {}
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(json.dumps(config))
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        levels = {chart.title: chart.level for _, charts in curves([open_run(run)]) for chart in charts}
        wanted = {"dino": "DINO loss", "ibot": "iBOT loss"}
        for kind in set(kinds) & set(wanted):
            seen += 1
            assert levels[wanted[kind] if several else "Loss"] and levels["Teacher entropy"]
    assert seen > 5


def test_every_metric_has_a_caption(trained_run):  # noqa: F811
    """Those of a run, those that objectives and protocols name in their code."""
    known = {name for _, captions in TRAINING for caption in captions for name in caption.names}
    for name in open_run(trained_run).metrics[0]:
        assert name in known | NO_CURVES
    for file in Path(ssl_locat.objectives.__file__).parent.glob("*.py"):
        logged = re.findall(r'return loss, \{(.*?)\}|return \{("\w+": self\.center.*?)\}', file.read_text())
        for name in re.findall(r'"(\w+)":', str(logged)):
            assert name in known, f"{file.name}: {name}"
    for name in OBJECTIVES:
        assert name in known
    for name in (
        "top1_k20_t0.1",
        "top5",
        "miou",
        "miou_hungarian",
        "pixel_accuracy",
        "locality_layer3",
        "sigma_layer1",
        "dse_intra_8",
    ):
        assert "under this name" not in score(name).what and score(name).good


def test_events_are_sentences():
    said = {
        "Resumed at step 40 on 8 processes, to step 1,000.": {"kind": "resume", "step": 40, "world_size": 8, "total_steps": 1000},
        "Probed knn at step 40 in 3.2 s.": {"kind": "probe", "step": 40, "name": "knn", "seconds": 3.2, "top1_k20": 50.0},
        "Stopped by SIGTERM at step 7, after saving.": {"kind": "preempt", "step": 7, "signal": "SIGTERM"},
        "Branched from a/step_00000004: optim.lr was 1, now 2.": {"kind": "branch", "step": 4, "parent": "a/step_00000004", "changes": ["optim.lr was 1, now 2"]},
        "Finished at step 9.": {"kind": "finish", "step": 9},
        "The checkpoint at step 4,000 is kept: the best so far by unlabelled.dse.": {"kind": "best", "step": 4000, "measure": "unlabelled.dse"},
        "Saved at step ?.": {"kind": "save"},
        "odd at step 1: why x.": {"kind": "odd", "time": "t", "step": 1, "why": "x"},
    }  # fmt: skip
    for words, event in said.items():
        assert (_saved([event.get("step", "?")]) if event["kind"] == "save" else sentence(event)) == words


def test_a_mark_stands_on_the_curves_it_is_for():
    chart = Chart("c", "", [Line("run: dse", [1, 2], [3, 4], name="dse")], "step")
    chart.mark(2, "best", curve="dse")
    chart.mark(2, "best", curve="miou")
    chart.mark(1, "resumed")
    assert [(mark["label"], mark["curve"]) for mark in chart.data()["marks"]] == [("best", "dse"), ("resumed", "")]


def test_recorded_attention_is_the_attention():
    q, k, v, mask = (torch.randn(2, 3, 5, 4) for _ in range(3)), None, None, torch.randn(2, 3, 5, 5)
    q, k, v = q
    with _Recorder() as recorder:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(recorder.weights[0] @ v, out)


def test_flatten_keeps_lists_whole():
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": 1}) == {"a.b": [1, 2], "a.c": {}, "d": 1}
