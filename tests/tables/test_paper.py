"""The shipped YAMLs are the paper's: docs/paper.md says of every setting what the text, the release and ours are, and the tables' numbers are published."""

import re
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT, SHARED

from ssl_locat.config.yaml_files import load_yaml, names, read_value
from ssl_locat.tables.schema import load_table

PAGE = ROOT / "docs" / "paper.md"
PAPER = SHARED / "notes" / "paper.md"


class Setting(NamedTuple):
    file: str  # "eval/supervised.yaml"
    key: str
    text: str
    release: str
    ours: str
    why: str


def sections() -> dict[str, str]:
    """File -> what the page says under its heading."""
    parts = re.split(r"^## .*?`((?:eval|configs/pretrain)/\w+\.yaml)`$", PAGE.read_text(), flags=re.M)
    return {file: text.partition("\n## ")[0] for file, text in zip(parts[1::2], parts[2::2], strict=True)}


def settings() -> list[Setting]:
    return [
        Setting(file, *(cell.strip() for cell in line.strip("|").split("|")))
        for file, text in sections().items()
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def told(cell: str):
    """The value of a cell that holds one, in backticks; None of one that holds words or nothing."""
    return read_value(cell.strip("`")) if re.fullmatch(r"`[^`]*`", cell) else None


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def shipped(file: str) -> dict:
    folder, _, name = file.removesuffix(".yaml").rpartition("/")
    return load_yaml(name, folder).data


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: f"{setting.file.rpartition('/')[2]}:{setting.key}")
def test_ours_is_what_the_yaml_says_and_agrees_where_no_reason_is_given(setting):
    ours = told(setting.ours)
    assert flat(shipped(setting.file))[setting.key.strip("`")] == ours
    sources = [told(cell) for cell in (setting.text, setting.release) if cell.startswith("`")]
    if not setting.why:
        assert sources and ours == sources[0], (
            "differs from the text (or the release, where that is silent), and the page gives no reason"
        )


@pytest.mark.parametrize("file", sections())
def test_no_key_of_a_yaml_is_missing_on_the_page(file):
    text = sections()[file]
    named = {re.search(r"`([\w.]+)`", line)[1] for line in text.splitlines() if line.startswith("| `")}
    own = re.search(r"(?:Of\s+ours|of\s+ours) alone: (.*?)\.\n", text, re.S)
    named |= set(re.findall(r"`(\w+)`", own[1])) if own else set()
    own_keys = yaml.safe_load((ROOT / file).read_text()).keys() - {"base"}  # what a base says stands under the base
    for key in own_keys:
        value = shipped(file)[key]
        inside = set(flat({key: value})) if isinstance(value, dict) else {key}
        assert key in named or inside <= named or key == "data", f"{file}: {inside - named} not on the page"


OURS = (
    "quick",
    "miniature",
    "satellite",
    "microscopy",
    "cameras",
    "cameras_stripes",
    "which_checkpoint",
    "which_checkpoint_long",
    "speedrun",
    "speedrun_cifar10",
    "speedrun_cifar10_hours",
    "speedrun_imagenette",
    "speedrun_camvid",
    "speedrun_gpu_cifar10",
    "speedrun_gpu_imagenette",
)  # tables that the paper does not have


def test_the_page_names_every_table_of_the_paper_and_every_protocol():
    text = PAGE.read_text()
    assert all(f"| `{name}` |" in text for name in names("eval/tables") if name not in OURS)
    assert all(f"eval/{name}.yaml`" in text or f"`{name}`" in text for name in names("eval"))


# the published numbers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> str:
    if not PAPER.exists():
        pytest.skip(f"no text to compare with: {PAPER} is not there (it lies beside the checkout, not in it)")
    return PAPER.read_text().replace("\n", " ")


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w-])\d+(?:\.\d+)?(?![\w])", text)]


def published(name: str) -> dict[str, list[float]]:
    table = load_table(name)
    return {
        row: [value.published[column] for column in table.columns if column in value.published]
        for row, value in table.rows.items()
    }


def test_the_main_table_is_published_so(paper):
    lines = re.findall(r"\| (Tiny|Base) (\w+) \|((?: [\d.]+(?: -> [\d.]+)? \|){6})", paper)
    found = {}
    for size, family, cells in lines:
        pairs = [cell.split(" -> ") for cell in cells.strip(" |").split(" | ")]
        for kind, twin in enumerate(("", " + LocAt")):
            found[f"{size} {family}{twin}"] = [float(pair[min(kind, len(pair) - 1)]) for pair in pairs]
    assert len(found) == 20 and published("main") == found
    # the trial of its machinery has the same rows
    assert (
        list(load_table("miniature").rows) == list(found)
        and load_table("miniature").columns.keys() == load_table("main").columns.keys()
    )


def test_hummingbird_and_related_work_are_published_so(paper):
    table = published("hummingbird")
    part = re.search(r"\*\*Hummingbird\*\*(.*?)\*\*Ablation", paper)[1]
    for size, text in zip(("Tiny", "Base"), re.split(r"Base: ", part), strict=True):
        for family, a, b, c, d in re.findall(r"(\w+) ([\d.]+) -> ([\d.]+), ([\d.]+) -> (\d+\.\d)", text):
            assert table[f"{size} {family}"] == [float(a), float(c)] and table[f"{size} {family} + LocAt"] == [float(b), float(d)]
    related = published("related_work")
    part = re.search(r"\*\*Related work\*\*[^:]*:[^:]*?: (.*?)\*\*Attention", paper) or re.search(
        r"\*\*Related work\*\*(.*?)\*\*Attention", paper
    )
    for name in ("CvT-21", "Conformer", "ConViT", "Twins", "DaViT", "GCViT"):
        assert related[name] == numbers(re.search(rf"{name} ([\d. ]+)", part[1])[1].rstrip(". ")), name


@pytest.mark.parametrize(("name", "heading", "count"), [("ablation", "Ablation", 7), ("kernels", "Kernels", 4)])
def test_ablation_and_kernels_are_published_so(paper, name, heading, count):
    part = re.search(rf"\*\*{heading}\*\*[^:]*: (.*?)(?:\*\*|$)", paper)[1]
    rows = re.findall(r"((?:[\d.]+ ){4})\| ((?:[\d.]+ ?){4})", part.replace(";", " ;"))
    assert len(rows) == count
    ours = list(published(name).values())
    assert [numbers(tiny) for tiny, _ in rows] == ours[:count]
    assert [numbers(base.strip(". ")) for _, base in rows] == ours[count:]


def test_the_small_tables_are_published_so(paper):
    ours = published("attention_design")
    part = re.search(r"\*\*Attention design\*\*[^:]*: (.*?)\*\*Kernels", paper)[1]
    pairs = re.findall(r"(\d\d\.\d\d) (\d\d\.\d\d)", part)
    assert [float(tiny) for tiny, _ in pairs] == [row[0] for row in list(ours.values())[:8]]
    assert [float(base) for _, base in pairs] == [row[0] for row in list(ours.values())[8:]]
    assert "2,340 added" in (SHARED / "golden" / "README.md").read_text() and ours["Tiny LocAtViT"][1] == 2340
    part = re.search(r"\*\*Small-scale classification\*\*(.*?)\*\*DINO", paper)[1]
    found = [[float(a), float(b)] for a, b in re.findall(r"(\d\d\.\d\d) -> (\d\d\.\d\d)", part)]
    small = published("small_scale")
    for index, size in enumerate("TSB"):
        assert [found[index][0], found[index + 3][0]] == small[f"ViT-{size}"] and [found[index][1], found[index + 3][1]] == small[
            f"LocAtViT-{size}"
        ]
    part = re.search(r"\*\*DINO\*\* (.*?)\*\*Hummingbird", paper)[1]
    values = [float(number) for number in re.findall(r"\d\d\.\d\d", part)]
    dino = published("dino")
    assert dino["ViT-S/16"] == [values[0], *values[2:6]] and dino["LocAtViT-S/16"] == [values[1], *values[6:10]]
