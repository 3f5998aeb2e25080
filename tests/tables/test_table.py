import csv
import json

import pytest
from scenes import write_split

from ssl_locat.config.yaml_files import names
from ssl_locat.errors import ConfigError, UserError
from ssl_locat.evaluation.evaluate import fingerprint
from ssl_locat.tables import table as program
from ssl_locat.tables.jobs import cells
from ssl_locat.tables.schema import load_table
from ssl_locat.tables.text import Cell, to_latex, to_markdown

SMALL = "timm:locatvit_tiny?img_size=32&patch_size=8&embed_dim=48&num_heads=3&depth="


@pytest.fixture
def small(tmp_path):
    data = write_split(tmp_path / "data", num_train=24, num_test=8)
    path = tmp_path / "small.yaml"
    path.write_text(f"""
title: Small & quick
results: {tmp_path / "results"}
data:
  colours: {{train: {data["train"]}, test: {data["test"]}}}
  masks: {{train: {data["train"]}, test: {data["test"]}, num_classes: 5}}
  unknown: {{train: null, test: null}}
columns:
  k-NN: {{protocol: knn, data: colours, metric: top1_k3, options: {{k: [3], workers: 0}}}}
  linear: {{protocol: linear, data: colours, metric: top1, seeds: [0, 1], options: {{epochs: 2, batch_size: 8, augment: false, workers: 0}}}}
  dense: {{protocol: hummingbird, data: masks, metric: miou, options: {{image_size: 32, workers: 0}}}}
  ADE20K: {{protocol: hummingbird, data: unknown, metric: miou}}
  params M: {{protocol: efficiency, metric: params, fresh: true, factor: 1.0e-6}}
rows:
  two runs: {{model: ["{SMALL}1", "{SMALL}2"], published: {{k-NN: 50.0, ADE20K: 23.47}}}}
  bad model: {{model: "{SMALL}1&no_such_option=1"}}
  untrained: {{fresh: "timm:vit_tiny"}}
""")
    return path


def test_runs_once_and_writes_three_kinds(small, tmp_path, caplog):
    folder, _ = program.run(str(small))
    files = sorted((folder / "cells").glob("*.json"))
    assert len(files) == 2 + 4 + 2 + 1  # k-NN, linear with two seeds, dense; two models each; and one efficiency
    rows = {(row["row"], row["column"]): row for row in csv.DictReader((folder / "table.csv").open())}
    knn = rows["two runs", "k-NN"]
    values = [json.loads(file.read_text())["metrics"]["top1_k3"] for file in files if file.name.startswith("knn")]
    assert float(knn["mean"]) == pytest.approx(sum(values) / 2) and knn["runs"] == "2" and float(knn["published"]) == 50
    assert float(knn["difference"]) == pytest.approx(float(knn["mean"]) - 50, abs=1e-5)
    assert rows["two runs", "linear"]["runs"] == "4"
    assert rows["two runs", "ADE20K"]["mean"] == "" and rows["two runs", "ADE20K"]["published"] == "23.47"
    assert float(rows["untrained", "params M"]["mean"]) == pytest.approx(5.717416)
    markdown, latex = (folder / "table.md").read_text(), (folder / "table.tex").read_text()
    assert "k-NN, difference" in markdown and "ADE20K, published" in markdown and "bad model, k-NN:" in markdown
    assert r"Small \& quick" in latex and r"\toprule" in latex

    before = {file: file.stat().st_mtime_ns for file in files}
    program.run(str(small))
    assert {file: file.stat().st_mtime_ns for file in (folder / "cells").glob("*.json")} == before
    files[0].unlink()
    program.run(str(small))
    assert len(list((folder / "cells").glob("*.json"))) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bad model=timm:vit_tinny", r"bad model, k-NN: timm has no model 'vit_tinny'. Did you mean 'vit_tiny'"),
        ("bad model=runs/nowhere", r"bad model, k-NN: there is no runs/nowhere"),
        ("data.colours.test=nowhere.tar", r"two runs, k-NN: .*nowhere.tar"),
        (
            "data.masks.num_classes=0",
            r"two runs, dense: hummingbird: data.num_classes is 0; expected a whole number of at least 1",
        ),
        ("columns.linear.options.epochs=many", r"columns.linear.options.epochs is 'many'; expected a whole number"),
        ("columns.params M.seeds=[0]", r"columns.params M.seeds is given, but efficiency takes no seed"),
        ("columns.params M.data=colours", r"columns.params M.data is given, but efficiency takes no data"),
        ("results=FILE/below", r"results is .*FILE/below, but .*FILE is a file"),
    ],
)
def test_what_is_wrong_is_reported_before_anything_is_measured(small, tmp_path, change, message):
    (tmp_path / "FILE").write_text("")
    with pytest.raises(UserError, match=message):
        program.run(str(small), [change.replace("FILE", f"{tmp_path}/FILE")])
    assert not (tmp_path / "results").exists()


def test_a_finished_cell_needs_its_data_no_more(small, tmp_path):
    program.run(str(small), ["columns.dense.data=unknown"])
    for shard in (tmp_path / "data").iterdir():
        shard.unlink()
    text = (tmp_path / "results" / "table.csv").read_text()
    small.write_text(small.read_text().replace("  bad model:", "  # bad model:"))
    program.run(str(small), ["columns.dense.data=unknown"])
    assert [line for line in text.splitlines() if "bad model" not in line] == (
        tmp_path / "results/table.csv"
    ).read_text().splitlines()


def test_a_table_with_cells_that_failed_ends_with_an_error(small, tmp_path):
    lines = [line for line in small.read_text().splitlines() if not line.startswith(("  two runs", "  untrained"))]
    small.write_text("\n".join(lines))
    _, error = program.run(str(small))
    assert isinstance(error, UserError) and error.exit_code == 2
    assert "4 of 4 cells of the table could not be measured; one of them: bad model, k-NN: " in str(error) and "table.md" in str(
        error
    )
    assert "bad model, dense:" in (tmp_path / "results" / "table.md").read_text()


def test_a_damaged_cell_is_measured_again(small, tmp_path, caplog):
    folder, _ = program.run(str(small))
    first, second, *_ = sorted((folder / "cells").glob("knn*.json"))
    text = first.read_text()
    first.write_text(text[:20])
    second.write_text("[]")
    program.run(str(small))
    assert json.loads(first.read_text())["metrics"] == json.loads(text)["metrics"]
    assert f"{first}: not the result of a cell; it is measured again" in caplog.text and str(second) in caplog.text


@pytest.mark.parametrize("rows", ["", "rows: null\n"])
def test_a_model_becomes_a_row_where_there_are_none(small, rows):
    small.write_text(small.read_text().partition("rows:\n")[0] + rows)
    assert load_table(str(small), ["runs/mine"]).rows["mine"].model == ["runs/mine"]


@pytest.mark.parametrize(
    ("rows", "message"), [("[a, b]", r"rows is \['a', 'b'\]; expected keys and values"), ("{mine: 5}", "rows.mine")]
)
def test_rows_of_another_kind_are_named(small, rows, message):
    small.write_text(small.read_text().partition("rows:\n")[0] + f"rows: {rows}\n")
    for arguments in ([], ["runs/mine"]):
        with pytest.raises(ConfigError, match=message):
            load_table(str(small), arguments)


def test_models_and_keys_on_the_command_line(small):
    table = load_table(str(small), ["untrained=a", "untrained=b", "data.unknown.train=x", "data.unknown.test=y", "runs/mine"])
    assert table.rows["untrained"].model == ["a", "b"]
    assert table.rows["mine"].model == ["runs/mine"]
    wanted = [(row, column) for row, column, *_ in cells(table)]
    assert wanted.count(("two runs", "ADE20K")) == 2 and ("mine", "ADE20K") in wanted
    with pytest.raises(ConfigError, match=r"'untraned' is no row.*Did you mean 'untrained'"):
        load_table(str(small), ["untraned=a"])


def test_a_run_that_was_resumed_is_evaluated_anew(tmp_path):
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    before = fingerprint(str(tmp_path))
    (tmp_path / "checkpoints" / "step_00000002").mkdir()
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("timm:vit_tiny") == "timm:vit_tiny"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric: top1_k3", "metrik: top1_k3", "unknown key 'columns.k-NN.metrik'. Did you mean 'metric'"),
        (
            "data: colours, metric: top1_k3",
            "data: colors, metric: top1_k3",
            "columns.k-NN.data is 'colors'.*Did you mean 'colours'",
        ),
        ("{k: [3], workers", "{q: [3], workers", "unknown key 'columns.k-NN.options.q'"),
        ("published: {k-NN", "options: {k-NN: {kk: 3}}, published: {k-NN", r"unknown key 'rows.two runs.options.k-NN.kk'"),
        ("published: {k-NN", "published: {kNN", "names the column 'kNN'.*Did you mean 'k-NN'"),
        ("protocol: linear,", "protocol: liner,", "Did you mean 'linear'"),
    ],
)
def test_wrong_keys_name_the_nearest(small, old, new, message):
    small.write_text(small.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_table(str(small))


@pytest.mark.parametrize("name", names("eval/tables"))
def test_every_shipped_table_is_whole(name):
    table = load_table(name)
    assert table.rows and table.columns
    for job in cells(table):
        assert job.model and job.protocol and isinstance(job.options, dict)
    if name not in ("quick", "satellite", "microscopy", "cameras", "cameras_stripes") and not name.startswith(
        ("speedrun", "which_checkpoint")
    ):  # ours, with nothing published beside them
        assert all(row.published for row in table.rows.values())


def test_shipped_numbers_are_the_papers():
    published = {name: load_table(name).rows for name in names("eval/tables")}
    assert published["main"]["Base ViT + LocAt"].published == {
        "ADE20K": 32.64, "P-Context": 45.35, "C-Stuff": 33.62, "top-1": 82.31, "params M": 86, "GMAC": 17.64,
    }  # fmt: skip
    assert published["dino"]["LocAtViT-S/16"].published["linear"] == 67.65
    assert published["hummingbird"]["Base Jumbo + LocAt"].published == {"VOC": 63.8, "ADE20K": 23.7}
    assert published["attention_design"]["Tiny Gaussian from x"].published == {"mini-ImageNet": 79.10}
    assert [len(published[name]) for name in ("main", "hummingbird", "ablation", "kernels", "related_work")] == [20, 20, 14, 8, 7]


def test_differences_inside_two_deviations_are_ties():
    close, far, single = Cell.of([50.0, 52.0], 53.0), Cell.of([50.0, 50.1], 53.0), Cell.of([50.0], 53.0)
    assert close.is_tie and not far.is_tie and not single.is_tie
    grid = {"a": {"x": close}, "b": {"x": Cell.of([], None)}}
    assert "| a | 51.00 ± 1.41 | 53.00 | -2.00 (tie) |" in to_markdown("t", "", grid, [])
    latex = to_latex("t", grid)
    assert r" & x & x, published & x, difference \\" in latex and r"a & 51.00 $\pm$ 1.41 & 53.00 & -2.00 (tie) \\" in latex
    assert "\nb " not in latex  # nothing is known of it


def test_names_cannot_break_a_table():
    grid = {"ViT | 50 %_\nnew\\~": {"a|b": Cell.of([1.0], None)}}
    assert r"| ViT \| 50 %_ new\~ | 1.00 |" in to_markdown("t", "", grid, []) and r"|  | a\|b |" in to_markdown("t", "", grid, [])
    assert r"ViT | 50 \%\_ new\textbackslash{}\textasciitilde{} & 1.00 \\" in to_latex("t", grid)
