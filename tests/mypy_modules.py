"""For mypy (pyproject.toml): an attribute that torch.nn.Module finds by `__getattr__` is Any, as what a network holds is known once it is built.

torch declares `Tensor | Module`, under which `backbone.embed_dim * 2` and `block.norm(x)` are both errors: four complaints in five were of
this kind. Attributes that a class declares or assigns keep their types.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny

DYNAMIC = "torch.nn.modules.module.Module."


class ModuleAttributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return dynamic if fullname.startswith(DYNAMIC) else None


def dynamic(context: AttributeContext) -> Type:
    """Any for what `__getattr__` found; what the class itself declares is no union of Tensor and Module."""
    return AnyType(TypeOfAny.special_form) if str(context.default_attr_type) == TENSOR_OR_MODULE else context.default_attr_type


TENSOR_OR_MODULE = "torch._tensor.Tensor | torch.nn.modules.module.Module"


def plugin(_version: str) -> type[Plugin]:
    return ModuleAttributes
