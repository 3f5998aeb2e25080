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


def keys(datasets, plan, start, batches):
    options = {"global_batch_size": 8, "world_size": 1, "accumulate_steps": 1, "workers": 0, "start_samples": start}
    with TrainStream(datasets, plan, key_alone, as_list, **options) as stream:
        return [key for _, batch in zip(range(batches), stream, strict=False) for key in batch.keys]


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
