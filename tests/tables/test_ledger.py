"""The ledger: lines of what trainings cost and reached, caps, what counts as progress, and the page made from the lines."""

import json
from pathlib import Path

import pytest
from tiny_run import write_config

from ssl_locat.config.schema import load
from ssl_locat.config.yaml_files import dump_yaml
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError
from ssl_locat.pretraining.operations import operations_of_run
from ssl_locat.runs.folder import cpu_name
from ssl_locat.tables import table
from ssl_locat.tables.ledger import append, check_caps, config_hash, entries, equal_cost, evaluation_hash, fill, progress, read
from ssl_locat.tables.schema import load_table

DOCS = Path(__file__).parents[2] / "docs"


def lines(row: str, pflop: float, values: list[float], baseline: bool = False, **changed) -> list[dict]:
    fixed = {
        "track": "t", "evaluation": "e", "commit": "c", "machine": "m", "precision": "fp32", "judged_by": "knn", "images": 100,
        "seconds": 9.0, "cpu_seconds": 100 * pflop, "linear": None, "dense": None,
    }  # fmt: skip
    return [
        {**fixed, "row": row, "config": row, "baseline": baseline, "seed": seed, "pflop": pflop, "knn": value, **changed}
        for seed, value in enumerate(values)
    ]


BASELINES = [
    *lines("quarter", 1, [40, 41, 42], baseline=True),
    *lines("half", 2, [50, 51, 52], baseline=True),
    *lines("whole", 4, [60, 61, 62], baseline=True),
]


def judged(*rows: dict) -> dict[str, str]:
    (found,) = entries([*BASELINES, *rows]).values()
    return {entry.row: progress(entry, found) for entry in found}


def test_what_counts_as_progress():
    answers = judged(
        *lines("as good for half", 2, [60, 61, 61]),
        *lines("half a point lower", 2, [60, 60.5, 61]),
        *lines("better", 4, [65, 66, 67]),
        *lines("within noise", 4, [62, 63, 63]),
        *lines("as noisy as that", 2, [45, 60, 75]),
        *lines("a step shorter, and no better", 0.99, [40, 41, 43]),
        *lines("cheap", 0.5, [20, 21, 22]),
        *lines("two seeds", 2, [90, 91]),
    )
    assert answers["whole"] == "baseline"
    assert answers["as good for half"] == answers["half a point lower"] == "yes: as whole, for 0.50 x the FLOP"
    assert answers["better"] == "yes: better at this cost"
    assert answers["within noise"] == answers["as noisy as that"] == "no: within two deviations of a baseline that costs no more"
    assert answers["a step shorter, and no better"] == answers["within noise"]
    assert answers["cheap"] == "no: cheaper than every baseline, and not as good"
    assert answers["two seeds"] == "no: 2 of 3 seeds"


def test_cost_at_the_same_value_is_read_between_lengths():
    (found,) = entries([*BASELINES, *lines("mine", 1, [56, 56, 56]), *lines("beyond", 1, [70, 70, 70])]).values()
    mine, beyond = (next(entry for entry in found if entry.row == row) for row in ("mine", "beyond"))
    assert equal_cost(mine, found, "pflop") == pytest.approx(1 / 8**0.5)  # half way between 2 and 4, in logarithms
    assert equal_cost(mine, found, "cpu_seconds") == pytest.approx(1 / 8**0.5)
    assert equal_cost(beyond, found, "pflop") is None


def test_the_page_is_made_from_the_lines():
    page = fill((DOCS / "ledger.md").read_text(), [*BASELINES, *lines("mine", 2, [60, 61, 61], seconds=None)])
    assert (
        "| mine (fp32) | 3 | 100 | 2 | 200 | - | 60.7 ± 0.6 | - | - | 0.51, 0.51 | yes: as whole, for 0.50 x the FLOP | `mine`, `c`, m |"
        in page
    )
    assert page.count("## t") == 1 and fill(page, []).count("No training") == 1
    assert (DOCS / "ledger.md").read_text() == fill((DOCS / "ledger.md").read_text(), read(DOCS / "ledger.jsonl")), (
        "python -m ssl_locat.tables.ledger docs/ledger.jsonl docs/ledger.md"
    )


def test_a_line_that_a_kill_cut_costs_no_other(tmp_path):
    file = tmp_path / "deep/ledger.jsonl"
    append(file, {"row": 1})
    file.write_text(file.read_text() + '{"row": 2, "tr')
    append(file, {"row": 3})
    assert [line["row"] for line in read(file)] == [1, 3]


def test_a_training_that_two_processes_wrote_down_is_one(tmp_path):
    file = tmp_path / "ledger.jsonl"
    line = {"track": "t", "row": "r", "seed": 0, "config": "c", "evaluation": "e"}
    for seed in (0, 0, 1):
        append(file, line | {"seed": seed})
    assert [found["seed"] for found in read(file)] == [0, 1]


def test_hashes_name_what_is_learned_and_how_it_is_judged():
    base = load("quickstart")
    assert config_hash(base) == config_hash(
        load("quickstart", ["run_dir=elsewhere", "seed=3", "data.workers=0", "probes.knn=null"])
    )
    assert config_hash(base) != config_hash(load("quickstart", ["precision=bf16"]))
    plain = evaluation_hash(load_table("speedrun"))
    assert plain == evaluation_hash(
        load_table("speedrun", ["data.textures.train=elsewhere/*.tar", "columns.k-NN.options.workers=1"])
    )
    assert plain != evaluation_hash(load_table("speedrun", ["columns.k-NN.options.k=[10]"]))


def test_blocks_and_stages_of_prototypes_cost_what_is_multiplied():
    """The last layer's share: scores of the teacher once, of the student with both gradients, over the prototypes in use."""

    def count(options: str) -> float:
        return operations_of_run(
            load("cifar10_cpu", [f"objective={{name: dino, hidden_dim: 32, bottleneck_dim: 16, {options}}}"])
        )

    plain, blocks = count("num_prototypes: 512"), count("num_prototypes: 512, prototype_block: 100")
    assert plain == blocks
    staged = count("num_prototypes: 512, active_prototypes: [[0, 256], [0.5, 512]]")
    assert plain - staged == 128 * 16 * 2 * (2 + 3 * 2)  # two views, none of them local


@pytest.fixture
def tiny(tmp_path):
    made = make_textures(tmp_path / "set", num_train=64, num_test=20, image_size=32, progress=False)
    recipe = write_config(tmp_path / "set", tmp_path)
    path = tmp_path / "run.yaml"
    content = {
        "title": "Tiny", "results": str(tmp_path / "results"),
        "ledger": {
            "file": str(tmp_path / "ledger.jsonl"), "track": "tiny", "pflop": 1e-3, "images": 200, "baselines": ["base"],
            "columns": {"knn": "k-NN", "dense": "dense"},
        },
        "data": {
            "set": {"train": made["train"], "test": made["test"], "num_classes": 10},
            "masks": {"train": made["train"], "test": made["test"], "num_classes": 11},
        },
        "train": {"recipe": str(recipe), "data": "set", "options": {"optim.epochs": 1}},
        "columns": {
            "k-NN": {"protocol": "knn", "data": "set", "metric": "top1_k5", "options": {"k": [5], "image_size": 32, "workers": 0}},
            "dense": {"protocol": "hummingbird", "data": "masks", "metric": "miou", "options": {"image_size": 32, "workers": 0}},
        },
        "rows": {"base": {}, "mine": {"train": {"options": {"optim.epochs": 2, "precision": "bf16"}}}},
    }  # fmt: skip
    path.write_text(dump_yaml(content))
    return path


def test_a_training_beyond_the_caps_is_refused_before_it_starts(tiny):
    with pytest.raises(ConfigError, match=r"mine: its training sees 256 images and costs .* the track tiny allows 200 and 0.001"):
        check_caps(load_table(str(tiny), ["rows.mine.train.options.optim.epochs=4"]))
    with pytest.raises(ConfigError, match="base: its training sees 64 images"):
        check_caps(load_table(str(tiny), ["ledger.pflop=1e-9"]))
    with pytest.raises(ConfigError, match="reads whole test sets"):
        check_caps(load_table(str(tiny), ["data.set.test_images=10"]))


@pytest.mark.slow  # two trainings
def test_a_table_writes_a_line_for_each_training_once(tiny, tmp_path):
    _, error = table.run(str(tiny))
    assert error is None
    base, mine = read(tmp_path / "ledger.jsonl")
    assert (base["row"], base["baseline"], base["images"], mine["row"], mine["baseline"], mine["images"]) == (
        "base", True, 64, "mine", False, 128
    )  # fmt: skip
    assert mine["precision"] == "bf16" and mine["pflop"] == pytest.approx(2 * base["pflop"], rel=1e-3) and base["pflop"] > 0
    assert base["machine"].startswith(cpu_name()) and 0 < base["cpu_seconds"] < 100 and base["seconds"] > 0
    assert 0 <= base["knn"] <= 100 and base["linear"] is None and mine["dense"] is not None
    assert base["evaluation"] == mine["evaluation"] and base["config"] != mine["config"]
    before = (tmp_path / "ledger.jsonl").read_text()
    table.run(str(tiny))
    assert (tmp_path / "ledger.jsonl").read_text() == before
    # lost, it comes back from what was measured
    (tmp_path / "ledger.jsonl").unlink()
    table.run(str(tiny))
    assert [json.loads(line)["knn"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()] == [
        base["knn"],
        mine["knn"],
    ]
