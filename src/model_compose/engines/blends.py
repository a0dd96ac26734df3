"""The options of named blends in the YAML: {adapter: weight}, or {method: ties, weights: {adapter: weight}, …}, where … are
the method's own options."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag, create_model
from pydantic_core import PydanticCustomError

from model_compose.lora.blend import Blend, names_method
from model_compose.lora.methods import METHODS, Method
from model_compose.registry import ByName
from model_compose.schema import Options, Weight

Weights = dict[str, Weight]


def _in_use(weights: Weights) -> Weights:
    if not any(weights.values()):
        raise PydanticCustomError(
            "weights", "a method needs an adapter whose weight is not 0; the bare base is the blend {} without a method"
        )
    return weights


class ByMethod(Options):
    """A blend by a method, as the YAML holds it. Subclasses add each method's own options."""

    method: str
    weights: Annotated[Weights, AfterValidator(_in_use)] = Field(description="{adapter: weight}")


def _with_weights(method: type[Method]) -> type[Any]:
    """The class of this method's blends in the YAML: `ByMethod` with the method's options."""
    name: Any = method.model_fields["method"].annotation
    return create_model(
        method.__name__,
        __base__=(ByMethod, method),
        __doc__=method.__doc__,
        __module__=__name__,
        method=(name, Field()),
    )


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        by_method = names_method(value) or isinstance(value.get("weights"), Mapping)
    else:
        by_method = isinstance(value, ByMethod)
    return "by a method" if by_method else "by weights"


if TYPE_CHECKING:
    BlendOptions: TypeAlias = Weights | ByMethod
else:
    # A tag becomes part of an error's location, so it must be a text that is never a key of the file.
    BlendOptions = Annotated[
        Annotated[Weights, Tag("by weights")]
        | Annotated[ByMethod, ByName(METHODS, "method", _with_weights), Tag("by a method")],
        Discriminator(_shape),
    ]


def weights_of(written: BlendOptions) -> Weights:
    """The weights of a named blend, in either form."""
    return written.weights if isinstance(written, ByMethod) else written


def to_blend(name: str, written: BlendOptions) -> Blend:
    """The blend that the YAML's options describe."""
    if isinstance(written, ByMethod):
        method = METHODS[written.method].model_validate(written.model_dump(exclude={"weights"}))
        return Blend(written.weights, name, method)
    return Blend(dict(written), name)
