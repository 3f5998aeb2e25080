"""Profiles, dry runs, sweeps; and real runs by torchrun and by submitit's LocalExecutor. Slurm itself: test_slurm.py."""

import json

import pytest
import torch
import yaml
from processes import Command, run_command

from ssl_locat import cli
from ssl_locat.cluster import jobs, launch
from ssl_locat.config.schema import load
from ssl_locat.config.yaml_files import names
from ssl_locat.errors import ConfigError, UserError

CONFIG = {
    "run_dir": "runs/a",
    "data": {"train": "textures/textures-train-*.tar", "workers": 0},
    "backbone": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "objective": {"name": "dino", "num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16, "frozen_last_layer_epochs": 0},
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optim": {"total_steps": 6, "global_batch_size": 8, "warmup_epochs": 0},
    "log": {"every_steps": 1, "tensorboard": False},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to start from, with a config and its data."""
    from ssl_locat.data.shards.textures import make_textures

    folder = tmp_path_factory.mktemp("launch")
    make_textures(folder / "textures", num_train=64, num_test=8, image_size=32)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    return folder


def losses(run_dir) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    return [record["loss"] for record in records]


def test_shipped_profiles_load():
    ranks = {name: launch.load_profile(name).ranks for name in names("launch")}
    assert ranks.keys() == {"local", "torchrun", "slurm", "slurm_preemptible"} and ranks["slurm"] == 8
    assert launch.load_profile("slurm,nodes=4,tasks_per_node=8").ranks == 32


def test_unknown_field_is_refused_with_the_nearest_and_the_list(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: slurm\npartitoin: gpu\n")
    with pytest.raises(
        ConfigError, match=r"mine.yaml:2: slurm has no field 'partitoin'. Did you mean 'partition'.*Known: account,"
    ):
        launch.load_profile(str(path))
    path.write_text("launcher: kubernetes\n")
    with pytest.raises(ConfigError, match="launcher is 'kubernetes'; expected one of local, torchrun, slurm"):
        launch.load_profile(str(path))
    with pytest.raises(ConfigError, match=r"torchrun has no field 'nproc'. Did you mean 'nproc_per_node'"):
        launch.load_profile("torchrun,nproc=2")


def test_dry_run_prints_the_script_and_writes_nothing(here, capsys):
    profile = here / "on.yaml"
    fields = {"nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "slurm_partition": "gpu", "account": "me", "qos": "long"}
    fields |= {"constraint": "h100", "gres": "disk:1", "slurm_dependency": "afterok:1", "slurm_setup": ["module load cuda"]}
    fields |= {"slurm_additional_parameters": {"reservation": "r"}, "environment": {"A": "b c"}, "timeout_min": 90, "mem_gb": 10}
    profile.write_text(yaml.safe_dump({"base": "slurm", **fields}))
    launch.submit_pretrain(load("config.yaml"), str(profile), dry_run=True)
    script = capsys.readouterr().out
    flags = ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "account=me", "qos=long", "constraint=h100")
    for flag in (
        *flags,
        "gres=disk:1",
        "dependency=afterok:1",
        "reservation=r",
        "requeue",
        "time=90",
        "mem=10GB",
        "signal=USR2@120",
    ):
        assert f"#SBATCH --{flag}\n" in script
    assert "module load cuda\n" in script and "export A='b c'\n" in script and "--kill-on-bad-exit=1" in script
    assert not (here / "runs").exists()


def test_batch_that_the_ranks_do_not_divide_is_refused_before_queueing(here):
    with pytest.raises(ConfigError, match=r"global_batch_size is 8.* 3 ranks"):
        launch.submit_pretrain(load("config.yaml"), "slurm,nodes=3,gpus_per_node=1", dry_run=True)


def test_missing_data_is_refused_before_queueing(here):
    with pytest.raises(UserError, match=r"nowhere"):
        launch.submit_pretrain(load("config.yaml", ["data.train=nowhere/a-{0..3}.tar"]), "slurm", dry_run=True)


def test_an_evaluation_is_checked_before_queueing(here, capsys):
    data = ["data.train=textures/textures-train-*.tar", "data.test=textures/textures-test-*.tar"]
    model = "timm:vit_tiny_patch16_224?img_size=32&patch_size=8"
    for wrong, message in (
        (("knn", "runs/none", data, "slurm"), "there is no runs/none"),
        (("knn", model, [data[0], "data.test=nowhere/x.tar"], "slurm"), r"nowhere/x\.tar"),
        (("knn", model, [*data, "neighbours=3"], "slurm"), "neighbours"),
        (("knn", model, data, "slurm,partitoin=x"), "partitoin"),
    ):
        with pytest.raises(UserError, match=message):
            launch.submit_evaluate(*wrong, dry_run=True)
    launch.submit_evaluate("knn", "runs/none", data, "slurm,slurm_dependency=afterok:1", dry_run=True)  # that job may write it
    launch.submit_evaluate("knn", model, data, "slurm,nodes=3", as_json=True, dry_run=True)
    scripts = capsys.readouterr().out
    assert "#SBATCH --job-name=ssl-locat-evaluate\n" in scripts and "#SBATCH --nodes=3\n" in scripts
    (here / "small.yaml").write_text(
        "{title: T, results: r, data: {x: {train: nowhere/y.tar, test: nowhere/y.tar}},"
        " columns: {c: {protocol: knn, data: x, metric: top1_k20}}, rows: {a: {model: 'timm:vit_tiny_patch16_224'}}}"
    )
    with pytest.raises(UserError, match=r"nowhere/y\.tar"):
        launch.submit_table("small.yaml", [], "slurm", dry_run=True)
    launch.submit_table("small.yaml", [f"data.x.train={data[0][11:]}", f"data.x.test={data[1][10:]}"], "slurm", dry_run=True)
    assert "#SBATCH --job-name=ssl-locat-table\n" in capsys.readouterr().out
    assert not (here / "jobs").exists()


def test_sweep_is_every_combination_each_in_its_folder(here):
    runs = launch.expand_sweep(load("config.yaml", ["sweep={seed: [0, 1], optim.lr: [1e-3, 0.01]}"]))
    assert [(run.seed, run.optim.lr) for run in runs] == [(0, 0.001), (0, 0.01), (1, 0.001), (1, 0.01)]
    assert runs[3].run_dir == "runs/a/seed=1,lr=0.01" and not runs[3].sweep
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.rate'"):
        launch.expand_sweep(load("config.yaml", ["sweep={optim.rate: [1]}"]))


def test_sweep_runs_here_one_after_the_other_when_asked(here, capsys):
    assert cli.run_command(["pretrain", "config.yaml", "sweep={seed: [0, 1]}", "--on", "local", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("1 processes: ssl-locat pretrain") == 2


@pytest.mark.parametrize("also", [["--dry-run"], ["--on", "slurm"], ["sweep={seed: [0, 1]}"]])
def test_replay_goes_alone(here, capsys, also):
    assert cli.run_command(["pretrain", "config.yaml", "--replay", "batch.safetensors", *also]) == 2
    assert "--replay looks at one saved batch" in capsys.readouterr().err


def test_jobs_are_found_by_number_and_folder_and_unknown_ones_named(here):
    jobs.add("17", str(here / "runs/a/slurm"), "runs/a", ["ssl-locat", "pretrain", "x"])
    assert jobs.find("17") == jobs.find("runs/a") == jobs.find(str(here / "runs/a/slurm"))
    with pytest.raises(UserError, match=r"no job of that number or run folder.* The last ones: 17"):
        jobs.find("18")
    with pytest.raises(UserError, match="needs a job number"):
        jobs.stop([])


def test_job_says_itself_what_slurm_does_not_know(here, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")  # no squeue, no scontrol, no sacct
    jobs.add("21", str(here), "runs/b", ["ssl-locat", "pretrain", "x"])
    for said, shown in (("COMPLETED", "COMPLETED"), ("STOPPED", "STOPPED"), ("RUNNING", "UNKNOWN (Slurm does not answer)")):
        jobs.write_status(str(here), "21", state=said, restart=2)
        assert jobs.state(jobs.find("21"), jobs.queue()) == shown
    assert jobs.state(jobs.find("21"), {}).startswith("LOST (last heard of ")  # Slurm answers, and has never heard of it
    with pytest.raises(UserError, match="Slurm does not answer"):
        jobs.stop(["21"])


def start(here, on: str, run: str, *more: str) -> Command:
    """The command is warm; the processes that it launches are started as a user's are."""
    return run_command("pretrain", "config.yaml", f"run_dir=runs/{run}", *more, "--on", on, folder=here)


def test_torchrun_and_local_processes_train_alike(here):
    (here / "two.yaml").write_text("base: local\ntasks_per_node: 2\n")
    done = start(here, "two.yaml", "local")
    assert done.returncode == 0 and "Finished 6 steps" in done.stderr, done.stderr
    done = start(here, "torchrun,nproc_per_node=2,max_restarts=0", "torchrun")
    assert done.returncode == 0, done.stderr
    assert losses(here / "runs/local") == losses(here / "runs/torchrun")
    snapshot = next((here / "runs/local/slurm").glob("snapshot-*"))
    assert (snapshot / "ssl_locat/pretraining/loop.py").exists() and load(str(snapshot / "config.yaml")).run_dir == "runs/local"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would find a GPU")
def test_failure_of_a_local_process_is_the_exit_code_and_the_message(here):
    (here / "two.yaml").write_text("base: local\ntasks_per_node: 2\n")
    # what can be checked before is refused before; a GPU is sought by the processes
    done = start(here, "two.yaml", "failing", "device=cuda")
    assert done.returncode == 2 and "PyTorch finds no GPU here" in done.stderr and "rank 0 on " in done.stderr


@pytest.mark.parametrize("name", ["A B", "X;rm", "1X", "A=B", "", "A-B", "A\nB"])
def test_names_of_environment_variables_are_checked(tmp_path, name):
    """They become `export NAME=value` in a job's script."""
    (tmp_path / "p.yaml").write_text(json.dumps({"launcher": "slurm", "environment": {name: "x"}}))
    with pytest.raises(ConfigError, match="no name of a variable"):
        launch.load_profile(str(tmp_path / "p.yaml"))
