"""A base class for components of other packages: everything that `Component` asks for, except an action's value."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from model_compose.components import ActionOptions, ComponentOptions, Delta, Result
from model_compose.lora.blend import Blend
from model_compose.progress import Report
from model_compose.room import Place


class BaseComponent(ABC):
    """A component of which only `answer` is missing.

    Options: its class of options, with its `type`, its own keys, and `action` and `actions`.
    """

    Options: ClassVar[type[ComponentOptions]]

    def __init__(self, options: Any, base_dir: Path) -> None:
        self.options, self.base_dir = options, base_dir

    @abstractmethod
    async def answer(self, action: ActionOptions, fields: Mapping[str, Any]) -> Any:
        """The action's value. fields: what the YAML gives for the action's own fields, with expressions evaluated.

        Raises InputError for values that the action cannot take, and RunError where it fails.
        """

    async def open(self, report: Report) -> None:  # noqa: B027
        """Nothing to load."""

    async def close(self) -> None:  # noqa: B027
        """Nothing to free."""

    async def run(
        self, action: ActionOptions, context: Mapping[str, Any], *, blend: Blend | None = None, sampling: Any = None,
        place: Place | None = None,
    ) -> AsyncGenerator[Delta | Result]:  # fmt: skip
        value = await self.answer(action, {name: each.evaluate(context) for name, each in action.templates.items()})
        if action.output_template is not None:
            value = action.output_template.evaluate({**context, "result": value})
        yield Result(value)
