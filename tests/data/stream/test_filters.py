"""A user's webdataset filters on the training stream: one sample of each, the order and the resume of before, imported only to be run."""

import io
import os
import pickle
import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_locat.config.schema import Config, load
from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.filters import Filters, filtered
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.pack import write_shard
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import ConfigError, CorruptSample, DataBudgetExceeded, UserError
from ssl_locat.evaluation.shared.samples import Members
from ssl_locat.runs.folder import differences
from tests.shards import as_list, fingerprint

HERE = "tests.data.stream.my_filters"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    for number in range(2):
        write_shard(folder / f"{number}.tar", ((f"s{number}_{i}", {"png": png(PIXELS), "cls": b"7"}) for i in range(12)))
    return str(folder / "*.tar")


def sample() -> RawSample:
    return RawSample({"png": png(PIXELS), "cls": b"7"}, "k3", "a.tar")


def apply(*names: str, raw: RawSample | None = None, seed: int = 5) -> RawSample:
    return filtered((raw or sample())._replace(filters=Filters([f"{HERE}:{name}" for name in names])), seed)


def test_map_rename_and_decode_make_a_sample_that_reads_as_before():
    renamed = apply("renamed")
    assert np.array_equal(decode_image(find_image(renamed.members, "image")), PIXELS)
    for name in ("decoded", "both"):  # numpy uint8; a float tensor [C, H, W]
        found = apply(name)
        assert np.array_equal(decode_image(find_image(found.members)), PIXELS) and find_label(found.members) == 7
    assert apply("both").key == "K3" and apply("shout", "renamed").key == "K3"


def test_what_is_drawn_at_random_is_the_samples_own():
    """Whoever computes it, and without a trace on the generators around it."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert apply("draw").members["txt"] == apply("draw").members["txt"] != apply("draw", seed=6).members["txt"]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_no_member_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    names = ("pyd", "x.PKL", "pickle.gz", "pth", "a.pt")
    raw = RawSample({"png": png(PIXELS), **dict.fromkeys(names, pickle.dumps(Bomb()))}, "k", "a.tar")
    assert apply("decoded", raw=raw).members.keys() == {"png"} and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("twice", UserError, "more than one sample of k3"),
        ("none", UserError, "made no sample of k3"),
        ("no_sample", UserError, "made 'bytes' of k3; expected a sample"),
        ("fails_on_3", CorruptSample, "fails_on_3: ValueError: no threes here"),
        ("shuffled", ConfigError, "webdataset's shuffle, which keeps samples back"),
        ("number", ConfigError, "is 3; expected a webdataset filter"),
        ("missing", ConfigError, "my_filters holds no 'missing'"),
    ],
)
def test_what_does_not_make_one_sample_of_each_is_refused(name, error, expected):
    with pytest.raises(error, match=expected):
        apply(name)


def test_a_filter_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match=r"'no_such:thing' cannot be imported.*PYTHONPATH"):
        filtered(sample()._replace(filters=Filters(["no_such:thing"])), 0)


def read(spec, workers: int, start: int, steps: int, **options) -> list:
    datasets, weights = open_mix(spec)
    plan = choose_plan(datasets, weights, 3, 4)
    with TrainStream(
        datasets, plan, fingerprint, as_list, start_samples=start, global_batch_size=4, workers=workers, **options
    ) as s:
        return [tuple(one) for _, batch in zip(range(steps), s, strict=False) for one in batch.payload]


def test_order_and_resume_stay_exact_with_filters(shards):
    """For any number of workers, from any place; and the order is that of the same data without them."""
    spec = [{"shards": shards, "filters": [f"{HERE}:draw", f"{HERE}:shout"]}]
    whole = read(spec, 0, 0, 8)
    assert read(spec, 2, 0, 8) == whole and read(spec, 1, 12, 5) == whole[12:]
    plain = read(shards, 0, 0, 8)
    assert [(key.upper(), seed) for key, _, seed in plain] == [(key, seed) for key, _, seed in whole]
    assert all(mine[1] != theirs[1] for mine, theirs in zip(whole, plain, strict=True))  # a member more


def test_a_sample_on_which_a_filter_fails_is_quarantined(shards, tmp_path):
    spec = [{"shards": shards, "filters": [f"{HERE}:fails_on_3"]}]
    found = read(spec, 1, 0, 6, max_bad=0.2, quarantine_path=tmp_path / "q.jsonl")
    assert len(found) == 24 and not any(key.endswith("3") for key, *_ in found)
    assert "no threes here" in (tmp_path / "q.jsonl").read_text()
    with pytest.raises(DataBudgetExceeded):
        read(spec, 0, 0, 6, max_bad=0)
    with pytest.raises(UserError, match="more than one sample"):
        read([{"shards": shards, "filters": [f"{HERE}:twice"]}], 1, 0, 1)


def test_folders_run_them_too(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(PIXELS))
    (dataset,), _ = open_mix([{"shards": str(tmp_path), "filters": [f"{HERE}:decoded"]}])
    (raw,) = dataset.read(0, 1)
    assert np.array_equal(decode_image(find_image(filtered(raw, 0).members)), PIXELS)


def test_loading_a_config_or_looking_at_a_run_imports_nothing(shards, monkeypatch):
    """The report's look at images included: a run folder of somebody's names code, which only whoever trains it runs."""
    monkeypatch.delitem(sys.modules, HERE, raising=False)
    config = load("quickstart", [f'data.train=[{{"shards": "{shards}", "filters": ["{HERE}:shout"]}}]'])
    spec = config.data.model_dump()["train"]
    (dataset,), _ = open_mix(spec)
    assert dataset.read(0, 1)[0].key.startswith("s") and pickle.loads(pickle.dumps(dataset)).filters.names == (f"{HERE}:shout",)
    assert Members(spec, run_filters=False)[0].key.startswith("s")
    assert HERE not in sys.modules
    assert Members(spec)[0].key.startswith("S") and HERE in sys.modules


def test_other_filters_are_another_run():
    config = partial(load, "quickstart")

    def train(*filters: str) -> dict:
        entry = {"shards": "a.tar", "filters": list(filters)}
        return Config.model_validate(config([]).model_dump() | {"data": {"train": [entry]}}).model_dump(mode="json")

    (found,) = differences(train(), train("a.b:c"))
    assert found.key == "data.train" and "a.b:c" in str(found)
    assert not list(differences(train("a.b:c"), train("a.b:c")))
    with pytest.raises(ConfigError, match=r"filters.*'os.system'; expected 'package.module:name'"):
        load("quickstart", ['data.train=[{"shards": "x", "filters": ["os.system"]}]'])
