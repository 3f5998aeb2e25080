"""`ssl-locat pretrain IMAGES`: the YAML is written first, as `init` does, and kept."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ssl_locat.config.schema import load
from ssl_locat.config.yaml_files import names
from ssl_locat.doctor.early import check_data, check_enough, check_key, name_of, yaml_to_write
from ssl_locat.errors import ConfigError, UserError, did_you_mean

log = logging.getLogger(__name__)


@contextmanager
def config_for(given: str, overrides: Sequence[str], dry_run: bool) -> Iterator[str]:
    """The YAML that `pretrain GIVEN` means. For images it is written first, as `init` does, and kept; with `dry_run` it goes again."""
    if not is_images(given):
        _check_recipe(given)
        yield given
        return
    for override in overrides:  # a misspelt key is answered before the machine is measured
        check_key(override)
    target = Path(f"{name_of(given)}.yaml")
    if target.exists():
        # init writes FOLDER, or FOLDER/train where it found one
        if (train := load(str(target)).data.train) not in (given, *(f"{given.rstrip('/')}{end}" for end in ("", "/train"))):
            raise UserError(
                f"{target} exists, for {train}. Run it as it is (ssl-locat pretrain {target}), or write another one: "
                f"ssl-locat init {given} --out OTHER.yaml"
            )
        log.info("%s was written for these images before, and is used as it is", target)
        yield str(target)
        return
    check_data(given)
    check_enough(given)
    if not dry_run:
        yaml_to_write(given)
    from ssl_locat.doctor.init import init

    with TemporaryDirectory() as folder:
        # the name stays: it becomes the run folder's
        yield str(init(given, str(Path(folder, target.name)) if dry_run else None, then_pretrain=True))


def is_images(given: str) -> bool:
    """Whether `pretrain GIVEN` names images or shards, not a config."""
    path = Path(given)
    if (path / "config.yaml").is_file():
        raise UserError(f"{given} is a run folder. Resume it with its config: ssl-locat pretrain {path / 'config.yaml'}")
    if path.suffix in (".yaml", ".yml"):
        return False
    # a recipe is a bare word; whatever else looks like a place is images
    return (
        path.is_dir()
        or "://" in given
        or ".tar" in path.name
        or path.suffix.lower() in (".parquet", ".zip")
        or any(letter in given for letter in "{*")
    )


def _check_recipe(given: str) -> None:
    """ConfigError for what is neither a YAML, nor a shipped recipe, nor images."""
    recipes = [*names("configs/pretrain"), *(f"adapt/{name}" for name in names("configs/adapt"))]
    if Path(given).suffix in (".yaml", ".yml") or given in recipes:
        return
    here = [path.name for path in Path().iterdir() if path.is_dir() or path.suffix in (".yaml", ".yml")]
    raise ConfigError(
        f"{given!r} is neither a YAML file, nor a folder of images or shards, nor a shipped recipe.{did_you_mean(given, [*recipes, *here])} "
        f"Recipes: {', '.join(recipes)}."
    )
