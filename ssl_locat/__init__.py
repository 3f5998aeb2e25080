"""Label-free pretraining of vision backbones with LocAtViT. `import ssl_locat` is cheap: torch and timm load on first use."""

from importlib import import_module

__version__ = "0.2.0"

# public name -> module that holds it; imported on first access (PEP 562)
_PUBLIC = {
    "attach_locat": "ssl_locat.models.attach",
    "create_backbone": "ssl_locat.models.backbone",
    "load_backbone": "ssl_locat.models.backbone",
    "features": "ssl_locat.models.tokens",
    "evaluate": "ssl_locat.evaluation.evaluate",
    "pretrain": "ssl_locat.pretraining.loop",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ssl_locat' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
