"""How many images a table's data sets hold, and a training sees: counted where they are here, as published where they are not."""

from ssl_locat.tables.jobs import TrainingJob
from ssl_locat.tables.schema import TableConfig, training_of


def images_of(table: TableConfig, name: str | None) -> tuple[int, int] | None:
    """(train, test) images of a data set: counted where it is here, as published where it is not."""
    if name is None:
        return None
    data = table.data[name]
    found: list[int] = []
    for part in ("train", "test"):
        limit: int | None = getattr(data, f"{part}_images")
        count: int | None = getattr(data.size, part) if data.size else None
        if getattr(data, part):
            count = opened(table, name, part)
        if count is None:
            return None
        found.append(min(count, limit or count))
    return found[0], found[1]


def opened(table: TableConfig, name: str, part: str) -> int:
    """Images of a set that is here."""
    from ssl_locat.evaluation.shared.samples import open_split
    from ssl_locat.evaluation.shared.seg_datasets import open_scenes

    given = table.data[name].given
    return len(open_scenes(given, part) if "layout" in given else open_split(given, part))


def seen_by(table: TableConfig, job: TrainingJob) -> int | None:
    """Images that a training by a recipe sees, repeated ones too."""
    training = training_of(table, table.rows[job.row])
    count = images_of(table, training.data if training else None)
    if count is None:
        return None
    config = job.config()
    steps_per_epoch = max(1, (config.data.epoch_samples or count[0]) // config.optim.global_batch_size)
    steps = config.optim.total_steps or max(1, round((config.optim.epochs or 0) * steps_per_epoch))
    return steps * config.optim.global_batch_size
