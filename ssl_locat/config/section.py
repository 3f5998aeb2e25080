"""What every section of a config is: frozen, without unknown keys; and the kinds of numbers that several have."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the config: no unknown keys, no changes after loading."""

    # `.inf` and `.nan` are numbers of YAML, and no key means one
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_for_number(cls, values: Any) -> Any:
        # pydantic reads `lr: true` as 1.0
        for name, value in values.items() if isinstance(values, dict) else ():
            known = cls.model_fields.get(name)
            if isinstance(value, bool) and known and known.annotation in (int, float, int | None, float | None):
                raise ValueError(f"{name} is {value}; expected a number")
        return values


class Options(Section):
    """A part with variants: a name, and options that the named thing's own signature checks."""

    # checked by `load` and not here: which keys exist depends on the name
    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
