"""What a person should know about texts that a model made: that some were cut, or came out empty, and why."""

from collections.abc import Iterator, Sequence

from model_compose.generation import Finish, Sampling, Usage


def notes(
    texts: Sequence[str], finishes: Sequence[Finish], sampling: Sampling, usage: Usage, *, past_template: bool
) -> tuple[str, ...]:
    """A sentence for each thing to know. usage: of all texts together.

    past_template: the prompt was raw, and the base has a chat template.
    """
    return (*_cut(texts, finishes, sampling, usage), *_empty(texts, finishes, sampling, usage, past_template))


def _cut(texts: Sequence[str], finishes: Sequence[Finish], sampling: Sampling, usage: Usage) -> Iterator[str]:
    cut = finishes.count("length")
    if not cut:
        return
    limit, context = sampling.max_output_length, "the end of the model's context"
    if limit is None or usage.completion_tokens < limit:
        where = context
    else:
        # Only a single text's own tokens are known.
        tokens = f"{limit} token{'s' if limit > 1 else ''}"
        where = f"max_output_length ({tokens})" + (f" or {context}" if len(texts) > 1 else "")
    yield f"{_some(cut, len(texts), 'was', 'were')} cut at {where}"


def _empty(
    texts: Sequence[str], finishes: Sequence[Finish], sampling: Sampling, usage: Usage, past_template: bool
) -> Iterator[str]:
    ended = [not text.strip() and finish == "stop" for text, finish in zip(texts, finishes, strict=True)]
    empty = sum(ended)
    if not empty:
        return
    head = f"{_some(empty, len(texts), 'is', 'are')} empty"
    if sampling.stop_sequences and usage.completion_tokens > len(texts):
        yield f"{head}: a stop sequence came first, or the model ended at once"
    elif past_template:
        yield (
            f"{head}: the model ended at once. The base has a chat template, which a raw prompt does not use: set task: "
            "chat-completion, or write the prompt in the template that the base or an adapter was trained with"
        )
    else:
        yield f"{head}: the model ended at once"


def _some(count: int, of: int, one: str, many: str) -> str:
    """Such as "the text was", or "2 of 3 texts were"."""
    if of == 1:
        return f"the text {one}"
    return f"{count} of {of} texts {one if count == 1 else many}"
