"""Every shipped recipe runs as its header says: on the profile that it names it fits the GPUs and the cores, on shards named as they are packed."""

import re
import shlex
from functools import cache
from itertools import product

import pytest

from ssl_locat.cluster.launch import load_profile
from ssl_locat.config.schema import load
from ssl_locat.config.yaml_files import names, shipped
from ssl_locat.pretraining.memory import memory_of, without_memory
from ssl_locat.runs.distributed import GATHERS_CAST

GPU_GB = 80
RECIPES = names("configs/pretrain")
PROFILES = [name for name in names("launch") if name != "dev_slurm"]


def header_command(recipe: str) -> list[str]:
    """Words of the header's command."""
    text = (shipped("configs/pretrain") / f"{recipe}.yaml").read_text()
    return shlex.split(re.search(r"^# Command: (.*)$", text, re.MULTILINE)[1])


def named_profile(recipe: str) -> str:
    words = header_command(recipe)
    return words[words.index("--on") + 1] if "--on" in words else "local"


def header_config(recipe: str):
    words = header_command(recipe)
    assert words[:3] == ["ssl-locat", "pretrain", recipe]
    given = [word for word in words[3:] if "=" in word and not word.startswith("slurm")]
    return load(recipe, [word for word in given if not word.startswith("backbone.init=")])


def cores(profile) -> int | None:
    """Of a rank, where the profile says."""
    return profile.options.get("cpus_per_task") or profile.options.get("slurm_cpus_per_task")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_the_profile_that_its_header_names(recipe):
    config, profile = header_config(recipe), load_profile(named_profile(recipe))
    assert config.optim.global_batch_size % (profile.ranks * config.optim.accumulate_steps) == 0
    assert memory_of(config, profile.ranks, networks(recipe)).total <= GPU_GB * 1e9


@cache
def networks(recipe: str):
    return without_memory(header_config(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sharded_needs_less(recipe):
    """Of a recipe's four forms none fails to be counted; sharding, and 16 bit, take less wherever the weights are many."""
    forms = {
        form: memory_of(load(recipe, [f"parallel={form[0]}", f"precision={form[1]}"]), 4, networks(recipe))
        for form in product(("ddp", "fsdp"), ("fp32", "bf16"))
    }
    assert all(part >= 0 for memory in forms.values() for part in memory) and all(memory.total > 0 for memory in forms.values())
    less = forms["fsdp", "fp32"].gathered - forms["fsdp", "bf16"].gathered
    assert less > 0 if GATHERS_CAST else less == 0
    for precision in ("fp32", "bf16"):
        sharded, whole = forms["fsdp", precision], forms["ddp", precision]
        assert sharded.optimizer == pytest.approx(whole.optimizer / 4) and sharded.activations == whole.activations
    for form in ("ddp", "fsdp"):
        # where blocks are recomputed, what is kept of them stays fp32
        assert forms[form, "bf16"].activations < 0.9 * forms[form, "fp32"].activations


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_can_be_started_on_every_profile(recipe, profile):
    """Its workers have cores, beside the trainer and the process that reads, and its batch is shared out evenly."""
    config, loaded = load(recipe, []), load_profile(profile)
    if cores(loaded):
        assert config.data.workers + 2 <= cores(loaded)
    assert config.optim.global_batch_size % (loaded.ranks * config.optim.accumulate_steps) == 0


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "imagenet/" in " ".join(header_command(recipe))])
def test_imagenet_is_named_as_it_is_packed(recipe):
    for config in (load(recipe, []), header_config(recipe)):
        assert config.data.train in ("imagenet/train/shard-*.tar", "imagenet/train/shard-{000000..001281}.tar")
        assert config.data.test in ("imagenet/val/shard-*.tar", "imagenet/val/shard-{000000..000049}.tar")


def test_gpus_of_a_node_are_said_once():
    assert load_profile("slurm").ranks == 8
    assert load_profile("slurm,nodes=2,gpus_per_node=4").ranks == 8
    assert load_profile("slurm,gpus_per_node=4,tasks_per_node=1").ranks == 1
    assert load_profile("slurm,gpus_per_node=null").ranks == 1
    assert load_profile("slurm_preemptible").ranks == 8
