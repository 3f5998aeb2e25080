"""The list of model names that is looked at before torch is imported (config/models.py), made from the installed timm:

python -m ssl_locat.models.names > ssl_locat/config/model_names.txt
"""

from importlib.metadata import version

import timm

from ssl_locat.models.registry import MODELS


def listing() -> str:
    """timm's version, then a name on each line."""
    return "\n".join([version("timm"), *sorted({*timm.list_models(), *MODELS})]) + "\n"


if __name__ == "__main__":
    print(listing(), end="")
