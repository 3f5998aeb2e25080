"""For mypy (pyproject.toml): an attribute of torch.nn.Module that no class declares is Any, as what a network holds is known once it is built.

torch declares `Tensor | Module`, under which `backbone.embed_dim * 2`, `block.norm(x)` and `model.seen_grids = {}` are all errors: four complaints
in five were of this kind. Attributes that a class declares or assigns keep their types.
"""

from collections.abc import Callable

from mypy.nodes import FuncDef
from mypy.plugin import AttributeContext, ClassDefContext, Plugin
from mypy.types import AnyType, CallableType, Type, TypeOfAny

MODULE = "torch.nn.modules.module.Module"
TENSOR_OR_MODULE = "torch._tensor.Tensor | torch.nn.modules.module.Module"


class ModuleAttributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return dynamic if fullname.startswith(f"{MODULE}.") else None

    def get_customize_class_mro_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
        return take_any_value if fullname == MODULE else None


def dynamic(context: AttributeContext) -> Type:
    """Any for what `__getattr__` found; what the class itself declares is no union of Tensor and Module."""
    return AnyType(TypeOfAny.special_form) if str(context.default_attr_type) == TENSOR_OR_MODULE else context.default_attr_type


def take_any_value(context: ClassDefContext) -> None:
    """`__setattr__(self, name, value: Any)`: what is assigned decides nothing that `__getattr__` would remember."""
    for node in context.cls.defs.body:
        if isinstance(node, FuncDef) and node.name == "__setattr__":
            for signature in (node.type, node.unanalyzed_type):
                if isinstance(signature, CallableType):
                    signature.arg_types[-1] = AnyType(TypeOfAny.special_form)


def plugin(_version: str) -> type[Plugin]:
    return ModuleAttributes
