"""The documentation is true: its code runs, its links lead somewhere, its tables are the schema's."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import yaml
from trained import write_config

from ssl_locat import cli
from ssl_locat.cluster.launch import load_profile
from ssl_locat.config import reference as config_reference
from ssl_locat.config.data_section import Metadata
from ssl_locat.config.schema import Config, load
from ssl_locat.config.yaml_files import names
from ssl_locat.data.images.bands import reading
from ssl_locat.data.images.decode import decode_image, find_label
from ssl_locat.data.shards.filters import filtered
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.pack import pack, write_shard
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.runs.diagnosis import KINDS
from ssl_locat.tables.schema import TableData, load_table

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# what a YAML with one of these bases is, if it is no part of a config
WITH_BASE = dict.fromkeys(names("launch"), load_profile) | dict.fromkeys(names("eval/tables"), load_table)
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, title or '', code) of a page's fenced blocks, in order."""
    return FENCE.findall((DOCS / page).read_text(encoding="utf-8"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with my_run.yaml, a run of seconds, from which the pages' code is run."""
    make_textures(tmp_path / "set", num_train=96, num_test=40, image_size=32, progress=False)
    settings = {"optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.01, "warmup_epochs": 0.1}}
    write_config(tmp_path, **settings).rename(tmp_path / "my_run.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_python_page_runs_from_top_to_bottom(workplace):
    code = "\n".join(code for language, _, code in blocks("python.md") if language == "python")
    (workplace / "notebook.py").write_text(code)
    names = runpy.run_path(str(workplace / "notebook.py"))
    assert names["vectors"].shape == (2, 24) and names["tokens"].patches.shape == (2, 24, 24) and "top1_k5" in names["scores"]
    assert names["mine"].has_gaug and names["summary"]["steps"] == 6


def test_the_extending_page_runs_as_it_stands(workplace, monkeypatch, capsys):
    for _, title, code in blocks("extending.md"):
        if title:
            (workplace / title).write_text(code)
    (command,) = [code for language, _, code in blocks("extending.md") if language == "bash"]
    cli.app(shlex.split(command)[1:], standalone_mode=False)
    runpy.run_path("train_narrow.py", run_name="__main__")
    assert (workplace / "runs/narrow/summary.json").is_file()
    monkeypatch.setitem(PROTOCOLS, "spread", "")  # so that what the page adds is taken back
    runpy.run_path("evaluate_spread.py")
    assert "'rank': " in capsys.readouterr().out


def test_the_webdataset_page_runs_from_top_to_bottom(workplace, capsys):
    """Photographs are packed and read by others; a run takes a filter of the page."""
    for label in range(2):
        (workplace / f"photos/{label}").mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(4 * label + i).integers(0, 256, (40, 40, 3), np.uint8)
            (workplace / f"photos/{label}/{i}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, 90))
    files = {title: code for _, title, code in blocks("webdataset.md") if title}
    pack("photos", "shards", workers=1)
    for name in ("read_shards.py", "read_by_datasets.py"):
        (workplace / name).write_text(files[name])
        runpy.run_path(name)
    assert re.search(r"\d_\d \(40, 40, 3\) [01]\n\(40, 40\) [01]\n\(40, 40\)\n", capsys.readouterr().out)
    (workplace / "my_filters.py").write_text(files["my_filters.py"])
    for path in Path("photos/1").iterdir():
        write_shard(f"shards/{path.stem}.tar", [(path.stem, {"photo": path.read_bytes(), "json": b'{"species": 5}'})])
    (part,) = [yaml.safe_load(code)["data"]["train"] for language, _, code in blocks("webdataset.md") if language == "yaml"]
    (part[0]["shards"],) = ["shards/[0-9].tar"]
    (dataset,), _ = open_mix(part)
    sample = filtered(dataset.read(0, 1)[0], 7)
    assert decode_image(sample.members["jpg"]).shape == (40, 40, 3) and find_label(sample.members) == 5


def test_every_yaml_in_the_docs_is_a_valid_part_of_a_config(workplace):
    base = yaml.safe_load((workplace / "my_run.yaml").read_text())
    seen = 0
    for page in PAGES:
        for language, title, code in blocks(str(page.relative_to(DOCS))):
            if language != "yaml" or title:
                continue
            path = workplace / "part.yaml"
            part = yaml.safe_load(code)
            if loader := WITH_BASE.get(part.get("base")):
                path.write_text(code)
                loader(str(path))
                continue
            merged = dict(base)
            for key, value in part.items():
                base_value = base.get(key, {})
                merged[key] = {**base_value, **value} if isinstance(value, dict) and isinstance(base_value, dict) else value
                if key == "optim" and "total_steps" in value:
                    merged[key].pop("epochs")
                seen += 1
            path.write_text(yaml.safe_dump(merged))
            load(str(path))
    assert seen >= 10


def test_the_guide_to_channels_makes_an_image(workplace):
    (code,) = [code for language, _, code in blocks("guides/channels.md") if language == "python"]
    (workplace / "save.py").write_text(code)
    runpy.run_path(str(workplace / "save.py"))
    bands = reading({"type": "uint16", "low": 0, "high": 3000}, (0.5,) * 6)
    image = decode_image((workplace / "image_0001.npy").read_bytes(), channels=bands)
    assert image.shape == (64, 64, 6) and 254 < image.max() <= 255


def test_the_config_reference_is_current():
    assert (DOCS / "config.md").read_text() == config_reference.reference(), (
        "python -m ssl_locat.config.reference > docs/config.md"
    )


def test_the_config_reference_names_the_keys_of_a_mapping():
    rows = re.findall(r"^\| `data\.metadata\.NAME\.(\w+)` \| ([^|]+) \|", config_reference.reference(), re.M)
    assert dict(rows).keys() == Metadata.model_fields.keys() and dict(rows)["values"] == "list of text"


def test_every_key_that_a_page_mentions_exists():
    sections = {name: config_reference._subsection(field.annotation) for name, field in Config.model_fields.items()}
    known = {name: set(section.model_fields) for name, section in sections.items() if section}
    for free in ("backbone", "objective", "probes"):
        known.pop(free, None)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name == "coming-from.md":  # the first column of its tables names the keys of others
            text = re.sub(r"^\|[^|]*\|", "", text, flags=re.M)
        more = {"data": set(TableData.model_fields)} if page.name == "evaluation.md" else {}  # a protocol's data
        for section, key in re.findall(r"`(\w+)\.(\w+)(?:[:=][^`]*)?`", text):
            if key not in ("py", "pth") and section in known:  # names of files
                assert key in known[section] | more.get(section, set()), f"{page.name}: {section}.{key}"


def test_links_and_pictures_lead_somewhere():
    dead = []
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|#", target) and not (page.parent / target.partition("#")[0]).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert not dead


def test_the_navigation_names_every_page():
    def pages(node) -> list[str]:
        return (
            [node]
            if isinstance(node, str)
            else [page for item in (node.values() if isinstance(node, dict) else node) for page in pages(item)]
        )

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert {str(page.relative_to(DOCS)) for page in PAGES} <= set(named)
    assert sorted(named) == sorted(set(named))


def test_every_kind_of_warning_is_explained():
    text = (DOCS / "watching.md").read_text()
    assert all(f"`{kind}`" in text for kind in KINDS)


def test_the_citation_file_is_valid_yaml_with_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and "2603.04892" in str(citation["preferred-citation"])
