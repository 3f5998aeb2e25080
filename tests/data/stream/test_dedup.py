"""`shards dedup`: what is there twice is listed, and left out where asked, by training and by evaluation, under the same resume."""

import io
import json
import tarfile

import cv2
import numpy as np
import pytest
from PIL import Image
from shards import add, as_list

from ssl_locat import cli
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.left_out import NAME, without_left_out
from ssl_locat.data.stream.plan import choose_plan, resume_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import CheckpointError, DataError, UserError


def encoded(image, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, **options)
    return stream.getvalue()


@pytest.fixture
def pattern(tmp_path):
    """Two shards of 24 images: the last of the second shard mirrors image 5 of the first, and its first has the bytes of image 2."""
    rng = np.random.default_rng(0)
    images = [
        cv2.resize(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC) for _ in range(46)
    ]
    files = [encoded(image, format="PNG") for image in images]
    files.insert(24, files[2])
    files.append(encoded(np.ascontiguousarray(images[5][:, ::-1]), format="JPEG", quality=60))
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(24 * shard, 24 * shard + 24):
                add(archive, f"{number:03d}.{'jpg' if number == 47 else 'png'}", files[number])
    return str(tmp_path / "*.tar")


def key_alone(raw, seed):
    return raw.key


def keys(datasets, plan, start, batches, world_size=1):
    """Of global batches of 8 from sample `start` on, as the ranks together see them."""
    options = {"global_batch_size": 8, "world_size": world_size, "accumulate_steps": 1, "workers": 0, "start_samples": start}
    found = []
    for rank in range(world_size):
        with TrainStream(datasets, plan, key_alone, as_list, rank=rank, **options) as stream:
            found.append([list(batch.keys) for _, batch in zip(range(batches), stream, strict=False)])
    return [key for batch in zip(*found, strict=True) for share in batch for key in share]


def test_duplicates_are_listed_left_out_and_the_stream_resumes_without_them(pattern, tmp_path, capsys):
    before, _ = open_mix(pattern)
    old = choose_plan(before, [1.0], 3, 8)
    assert cli.run_command(["shards", "dedup", pattern, "--leave-out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {tuple(pair["keys"]) for pair in found["within"]} == {("002", "024"), ("005", "047")} and found["left_out"] == 2
    lines = (tmp_path / NAME).read_text().splitlines()
    assert [json.loads(line)[3] for line in lines[1:]] == ["024", "047"]

    datasets = [without_left_out(dataset) for dataset in open_mix(pattern)[0]]
    assert len(datasets[0]) == 46 and datasets[0].manifest_hash != before[0].manifest_hash
    with pytest.raises((CheckpointError, UserError)):
        resume_plan(old.to_dict(), datasets, [1.0], 3)  # a run that saw them does not go on as if it had not
    plan = choose_plan(datasets, [1.0], 3, 8)
    whole = keys(datasets, plan, 0, 12)
    assert not {"024", "047"} & set(whole) and len(set(whole[:48])) >= 44
    assert keys(datasets, resume_plan(json.loads(json.dumps(plan.to_dict())), datasets, [1.0], 3), 40, 7) == whole[40:]

    from ssl_locat.evaluation.shared.samples import open_spec

    assert len(open_spec(pattern)) == 46
    # what is left out is looked at again: the command says the same, and writes the same list
    assert cli.run_command(["shards", "dedup", pattern, "--leave-out"]) == 0
    assert (tmp_path / NAME).read_text().splitlines() == lines


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_list_is_obeyed_at_any_number_of_ranks_and_after_any_restart(pattern, tmp_path, capsys, kind):
    """A run that is killed and goes on with other ranks: from one integer, in tars and in Parquet files, and the list is of few bytes."""
    spec = pattern if kind == "tar" else _as_parquet(pattern, tmp_path)
    assert cli.run_command(["shards", "dedup", spec, "--leave-out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == 2
    datasets = [without_left_out(dataset) for dataset in open_mix(spec)[0]]
    plan = choose_plan(datasets, [1.0], 3, 8)
    whole = keys(datasets, plan, 0, 12)
    twice = {"tar": {"024", "047"}, "parquet": {"1.parquet#0", "1.parquet#23"}}[kind]
    left_out = {raw.key for raw in open_mix(spec)[0][0].read(0, 48)} - set(whole)
    assert len(left_out) <= 4 and not {key for key in whole if key in twice}, (left_out, twice)
    seen, world = [], (1, 4, 2)
    for start, ranks in zip((0, 32, 64), world, strict=True):
        again = [without_left_out(dataset) for dataset in open_mix(spec)[0]]
        some = keys(again, resume_plan(json.loads(json.dumps(plan.to_dict())), again, [1.0], 3), start, 4, ranks)
        seen += [sorted(some[at : at + 8]) for at in range(0, 32, 8)]
    assert seen == [sorted(whole[at : at + 8]) for at in range(0, 96, 8)]


def _as_parquet(pattern, tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for shard in range(2):
        images = []
        for raw in open_mix(str(tmp_path / f"{shard}.tar"))[0][0].read(0, 24):
            images.append({"bytes": next(iter(raw.members.values())), "path": raw.key})
        pq.write_table(pa.table({"image": images}), tmp_path / f"{shard}.parquet", row_group_size=7)
    return str(tmp_path / "*.parquet")


def test_what_is_left_out_is_like_one_that_stays():
    """A film, each frame like the next and no other: every second one goes, not all but the first; and of many copies all but one."""
    from ssl_locat.data.stream.dedup import redundant
    from ssl_locat.data.stream.duplicates import Looks, Pairs, duplicates

    looks = Looks(np.zeros((6, 32, 32), np.uint8), np.arange(1, 7, dtype=np.uint64))
    film = Pairs(np.arange(5), np.arange(1, 6), np.full(5, 0.95, np.float32))
    assert redundant(film, looks) == {1: "sample 0", 3: "sample 2", 5: "sample 4"}
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (7, 7), dtype=np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC)
    copies = np.clip(image.astype(int) + rng.integers(-3, 4, (40, 32, 32)), 0, 255).astype(np.uint8)
    many = Looks(copies, np.arange(1, 41, dtype=np.uint64))
    from ssl_locat.data.stream.duplicates import find_pairs

    pairs = find_pairs(many)
    assert (
        len(pairs) < 40 * 8 + 1 and len(redundant(pairs, many)) == 39 and duplicates(many)[0].first < duplicates(many)[0].second
    )


def test_a_list_of_other_shards_is_refused_and_a_folder_has_none(pattern, tmp_path):
    (tmp_path / NAME).write_text('ssl_locat left out 1\n["0.tar", "another", 3, "003", "sample 1"]\n')
    with pytest.raises(DataError, match=r"another 0\.tar"):
        without_left_out(open_mix(pattern)[0][0])
    (tmp_path / NAME).write_text("what is this\n")
    with pytest.raises(DataError, match="delete it"):
        without_left_out(open_mix(pattern)[0][0])


def test_what_a_test_set_holds_is_left_out_too(pattern, tmp_path, capsys):
    assert cli.run_command(["shards", "dedup", str(tmp_path / "0.tar"), "--against", str(tmp_path / "1.tar"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {tuple(pair["keys"]) for pair in found["between"]} == {("002", "024"), ("005", "047")}
    assert found["left_out"] == 2 and not (tmp_path / NAME).exists()
