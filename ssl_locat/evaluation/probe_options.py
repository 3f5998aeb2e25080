"""The `probes` section of a config: which protocols may run during training, and their options. Imports no torch."""

from typing import Any

from ssl_locat.config.schema import Config
from ssl_locat.config.yaml_files import LoadedYaml
from ssl_locat.errors import ConfigError, did_you_mean
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation.shared.options import check_arguments
from ssl_locat.runs.best import check_choices

ONLINE = [
    name for name in PROTOCOLS if name not in ("supervised", "validate", "attention", "efficiency")
]  # frozen backbone, numbers that move

MOST_JUDGED = 10_000  # images of held_out, unless said otherwise: an interval of +-1 point at most

# protocols whose labels are masks
DENSE = ("segmentation", "hummingbird")


def check_probes(config: Config) -> None:
    """ConfigError for a probe that is none, for options that its protocol does not take, and for what no probe measures."""
    for name, options in config.probes.options.items():
        resolve(name, options or {}, own_data(config))
    check_choices(config)


def own_data(config: Config) -> dict:
    """The run's own sets, which probes read unless they name others."""
    data = config.data.model_dump(mode="json")
    own = {
        name: data[name]
        for name in ("train", "test", "num_classes", "image_key", "label_key", "max_bad", "retry_minutes", "cache")
    }
    return {**own, "judged": judged(data)}


def judged(data: dict[str, Any]) -> dict[str, Any]:
    """The one labelled set of `held_out`, of a `data` section: data.validation, else data.test, else what data.held_out keeps from training."""
    for name in ("validation", "test"):
        if data[name]:
            return {"train": None, "test": data[name], "train_images": None, "test_images": MOST_JUDGED}
    if data["held_out"]:
        return {"train": data["train"], "test": None, "train_images": data["held_out"], "test_images": None}
    return {"train": None, "test": None, "train_images": None, "test_images": None}


def resolve(name: str, options: dict[str, Any], data_defaults: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The protocol of a probe and its arguments. Raises ConfigError for what the protocol does not take.

    Args:
        name: a protocol. An option `protocol` overrides it, so that one protocol can run twice under two names.
        options: the protocol's keys; `data` is laid over `data_defaults` key by key.
        data_defaults: the run's own train and test sets.
    """
    if not isinstance(options, dict):
        raise ConfigError(f"probes.{name} is {options!r}; expected its protocol's keys and values, or null.")
    options = dict(options)
    own = options.pop("data", None) or {}
    if not isinstance(own, dict):
        raise ConfigError(f"probes.{name}.data is {own!r}; expected keys and values, such as {{train: IMAGES, test: IMAGES}}.")
    protocol = options.pop("protocol", name)
    if protocol not in ONLINE:
        raise ConfigError(f"probes.{name}: {protocol!r} is no probe; known: {', '.join(ONLINE)}.{did_you_mean(protocol, ONLINE)}")
    own_set = data_defaults.get("judged") or {}
    inherited = {key: value for key, value in data_defaults.items() if key != "judged"}
    if protocol == "held_out":  # all of its one set, however many images the other probes read
        inherited |= own_set
    if protocol in DENSE:  # classes of masks are not those of images
        inherited = {key: value for key, value in inherited.items() if key not in ("num_classes", "label_key")}
    data = {**inherited, **own}
    arguments = {**options, "data": {key: value for key, value in data.items() if value is not None}}
    if protocol == "held_out" and not {"train", "test"} & arguments["data"].keys():
        raise ConfigError(
            f"probes.{name} needs labelled images to judge by: data.validation=IMAGES, or data.held_out=N of a labelled data.train."
        )
    check_arguments(PROTOCOLS[protocol], arguments, LoadedYaml("the config", {}), ("probes", name))
    return protocol, arguments
