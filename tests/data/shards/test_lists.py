"""wids lists of shards, and folders whose shards lie by splits: repositories of the Hugging Face hub and copies of them."""

import json

import pytest

from ssl_locat.data.shards.index import open_dataset, open_mix
from ssl_locat.errors import DataError
from ssl_locat.evaluation.shared.samples import open_split
from tests.shards import write_shard, write_shards


def keys(dataset) -> list[str]:
    return [sample.key for sample in dataset.read(0, len(dataset))]


def wids(path, **content) -> str:
    path.write_text(json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, **content}))
    return str(path)


def shard(url: str, nsamples: int, **more) -> dict:
    return {"url": url, "nsamples": nsamples, **more}


def test_a_wids_list_opens_in_its_order_and_beside_itself(tmp_path):
    write_shards(tmp_path / "data", [3, 2])
    listed = wids(tmp_path / "data/list.json", name="mine", shardlist=[shard("001.tar", 2), shard("000.tar", 3)])
    dataset = open_dataset(listed)
    assert keys(dataset) == ["001_00000", "001_00001", "000_00000", "000_00001", "000_00002"]
    moved = wids(tmp_path / "elsewhere.json", base=str(tmp_path / "data"), shardlist=[shard("000.tar", 3)])
    assert len(open_dataset(moved)) == 3
    assert open_mix(moved)[1] == [1.0]


def test_a_list_of_lists_with_weights_is_a_mix(tmp_path):
    for name, count in (("a", 4), ("b", 2)):
        write_shards(tmp_path / name, [count])
        wids(tmp_path / name / "list.json", shardlist=[shard("000.tar", count)])
    both = [
        {"source_url": "a/list.json", "weight": 3},
        {"shardlist": [shard("b/000.tar", 2)], "base": str(tmp_path), "weight": 1},
    ]
    datasets, weights = open_mix(wids(tmp_path / "both.json", datasets=both))
    assert [len(dataset) for dataset in datasets] == [4, 2] and weights == [0.75, 0.25]
    datasets, weights = open_mix([{"shards": str(tmp_path / "both.json"), "weight": 2.0}, {"shards": str(tmp_path / "a/*.tar")}])
    assert weights == [1.5, 0.5, 1.0]
    assert len(open_dataset(str(tmp_path / "both.json"))) == 6  # for what reads each sample once


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is no JSON"),
        ("[1]", "no wids list"),
        ('{"wids_version": 2, "shardlist": []}', "no wids list"),
        ('{"wids_version": 1, "shardlist": []}', "lists no shards"),
        ('{"wids_version": 1, "shardlist": ["000.tar"]}', "lists of objects"),
        ('{"wids_version": 1, "shardlist": [{"url": "000.tar"}]}', "is no shard; expected"),
        ('{"wids_version": 1, "shardlist": [{"url": "000.tar", "nsamples": 3, "weight": -1}]}', "weight .* is -1"),
        (
            '{"wids_version": 1, "shardlist": [{"url": "000.tar", "nsamples": 9}]}',
            r"holds 9 samples, but it holds 3.*Write it anew",
        ),
        ('{"wids_version": 1, "shardlist": [{"url": "pipe:cat x.tar", "nsamples": 3}]}', "no commands"),
        ('{"wids_version": 1, "shardlist": [{"url": "zip://x::000.tar", "nsamples": 3}]}', "no '::' chains"),
        ('{"wids_version": 1, "shardlist": [{"url": "1.tar", "nsamples": 3}]}', "1.tar does not exist"),
        ('{"wids_version": 1, "datasets": [{"source_url": "list.json"}]}', "name lists again"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(tmp_path, content, expected):
    write_shards(tmp_path, [3])
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(DataError, match=expected):
        open_dataset(str(tmp_path / "list.json"))


def test_a_list_from_elsewhere_names_no_file_of_this_machine(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe_file(
        "/x/list.json", json.dumps({"shardlist": [shard(f"file://{tmp_path}/0.tar", 1)]}).encode()
    )
    with pytest.raises(DataError, match="a file of this machine"):
        open_dataset("memory://x/list.json")


@pytest.fixture
def repository(tmp_path):
    """As the hub has them: data/SPLIT-NNNNN.tar and a README."""
    for split, count in (("train-00000", 3), ("train-00001", 2), ("validation-00000", 1)):
        write_shard(tmp_path / "data" / f"{split}.tar", [f"{split}_{i}" for i in range(count)])
    (tmp_path / "README.md").write_text("# Images\n")
    return tmp_path


def test_a_repository_opens_by_its_splits(repository):
    (train,), _ = open_mix(str(repository), split="train")
    assert [key[:11] for key in keys(train)] == ["train-00000"] * 3 + ["train-00001"] * 2
    assert keys(open_split({"test": str(repository)}, "test")) == ["validation-00000_0"]
    # which one is meant where nobody says it: what to write for each
    with pytest.raises(
        DataError, match=r"2 splits.*train \(2 shards\): \S+/data/train-0000\*\.tar; validation \(1 shards\): \S+00000\.tar"
    ):
        open_dataset(str(repository))
    assert len(open_dataset(f"{repository}/data/train-0000*.tar")) == 5


def test_the_readme_says_which_shards_are_which_split(repository):
    """Also of shards that lie at the top, which would all be opened otherwise."""
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: 'data/validation-*.tar'}\n"
        "  - {split: test, path: ['data/train-00001.tar', '**/*0.tar']}\n---\n# Images\n"
    )
    (train,), _ = open_mix(str(repository), split="train")
    assert keys(train) == ["validation-00000_0"]
    write_shard(repository / "top.tar", ["a"])
    (repository / "README.md").write_text("---\nconfigs:\n- {config_name: default, data_files: top.tar}\n---\n")
    assert keys(open_dataset(str(repository))) == ["a"]
    (repository / "README.md").write_text(
        "---\nconfigs: [{config_name: a, data_files: x}, {config_name: b, data_files: y}]\n---\n"
    )
    with pytest.raises(DataError, match=r"several configurations \(a, b\)"):
        open_dataset(str(repository))


@pytest.mark.parametrize(
    "header",
    [
        "---\nconfigs: 3\n---\n",
        "---\n[\n---\n",
        "---\nconfigs: [1]\n---\n",
        "---\nconfigs: [{data_files: [3, {path: {}}]}]\n---\n",
    ],
)
def test_a_readme_that_says_nothing_of_use_is_passed_over(repository, header):
    (repository / "README.md").write_text(header)
    (train,), _ = open_mix(str(repository), split="train")
    assert len(train) == 5
