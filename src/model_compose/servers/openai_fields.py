"""Fields of OpenAI's clients that have no counterpart here. They are accepted if they change nothing, else refused by name.

Client libraries and front ends send many fields with the value that means "no change".
"""

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from model_compose.schema import Options, invalid

Neutral = Mapping[str, tuple[Any, ...]]
"""Fields, each with the values that change nothing. null always changes nothing."""

UNSUPPORTED: Mapping[str, Neutral] = {
    "this server calls no tools": {
        "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
        "web_search_options": (),
    },
    "answers are text alone": {"modalities": (["text"],), "audio": ()},
    "text is added only at the end of the prompt": {"suffix": ("",)},
    "answers hold only the new text, without special tokens and stop strings": {
        "echo": (False,), "include_stop_str_in_output": (False,), "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,), "return_token_ids": (False,), "return_tokens_as_token_ids": (False,),
    },
    "every text that is drawn is answered": {"best_of": (1,)},
    "the model has no such control": {"reasoning_effort": ("none",), "verbosity": ("medium",)},
    "the base's chat template is used as it is": {
        "chat_template": ("",), "chat_template_kwargs": ({},), "add_generation_prompt": (True,),
        "continue_final_message": (False,), "documents": ([],),
    },
    "this server does not draw tokens this way": {
        "use_beam_search": (False,), "num_beams": (1,), "length_penalty": (1,), "early_stopping": (False,),
        "ignore_eos": (False,), "ban_eos_token": (False,), "min_tokens": (0,), "stop_token_ids": ([],),
        "bad_words": ([],), "typical": (1,), "typical_p": (1,), "tfs": (1,), "tfs_z": (1,), "top_a": (0,),
        "mirostat": (0,), "mirostat_mode": (0,), "dynatemp_range": (0,), "smoothing_factor": (0,),
        "xtc_probability": (0,), "dry_multiplier": (0,), "nsigma": (0,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
        "no_repeat_ngram_size": (0,), "penalty_alpha": (0,), "guidance_scale": (1,),
    },
}  # fmt: skip

WITHOUT_EFFECT = frozenset({"prediction", "prompt_cache_retention", "cache_prompt", "cache_control"})
"""Fields that elsewhere make an answer faster or cheaper, but never different."""

_NUMBERS = {int, float}


class ClientOptions(Options):
    """A part of a request's body. A field that is null counts as left out, even if it is unknown here.

    unsupported: fields that are refused unless their value changes nothing, by the reason for refusing them.
    """

    unsupported: ClassVar[Mapping[str, Neutral]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if cls._has_effect(key, value)}

    @classmethod
    def _has_effect(cls, key: str, value: Any) -> bool:
        """Whether the field is one of this model's, or unknown. Raises PydanticCustomError for what cannot be done."""
        if key in cls.model_fields:
            _refuse_boolean(key, value, cls.model_fields[key])
            return True
        if value is None or key in WITHOUT_EFFECT:
            return False
        for reason, neutral in cls.unsupported.items():
            if key in neutral:
                if value in neutral[key]:
                    return False
                raise wrong(key, f"{reason}; leave it out")
        return True


def _refuse_boolean(key: str, value: Any, field: FieldInfo) -> None:
    """Refuses true and false for a number: pydantic would read true as 1."""
    types = {field.annotation, *get_args(field.annotation)}
    if isinstance(value, bool) and types & _NUMBERS and bool not in types:
        raise wrong(key, "a number is needed, not a boolean")


def wrong(field: str, message: str) -> PydanticCustomError:
    """The error about one field, for validators that see the whole body."""
    return invalid(message, field)
