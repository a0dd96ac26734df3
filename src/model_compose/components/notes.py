"""What a person should know about texts that a model made: which were cut or came out empty, and why."""

from collections.abc import Collection, Iterator

from model_compose.generation import Finish, Sampling, Usage


def notes(
    texts: Collection[str], finishes: list[Finish], sampling: Sampling, usage: Usage, *, past_template: bool
) -> tuple[str, ...]:
    """A sentence for each thing to know. usage: of all texts together.

    past_template: whether the prompt was raw although the base has a chat template.
    """
    chat = "set task: chat-completion" if past_template else None
    return (*_cut(texts, finishes, sampling, usage), *empty(texts, finishes, sampling, usage, chat=chat))


def _cut(texts: Collection[str], finishes: list[Finish], sampling: Sampling, usage: Usage) -> Iterator[str]:
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


def empty(
    texts: Collection[str], finishes: list[Finish], sampling: Sampling, usage: Usage, *, chat: str | None
) -> tuple[str, ...]:
    """Why texts came out empty, as a sentence; none if all of them say something.

    chat: how to use the base's chat template, for a raw prompt to a base that has one.
    """
    ended = [not text.strip() and finish == "stop" for text, finish in zip(texts, finishes, strict=True)]
    if not any(ended):
        return ()
    head = f"{_some(sum(ended), len(texts), 'is', 'are')} empty"
    if sampling.stop_sequences and usage.completion_tokens > len(texts):
        return (f"{head}: a stop sequence came first, or the model ended at once",)
    if chat is None:
        return (f"{head}: the model ended at once",)
    return (
        f"{head}: the model ended at once. The base has a chat template, which a raw prompt does not use: {chat}, or write "
        "the prompt in the template that the base or an adapter was trained with",
    )


def _some(count: int, of: int, one: str, many: str) -> str:
    """Such as "the text was", or "2 of 3 texts were"."""
    if of == 1:
        return f"the text {one}"
    return f"{count} of {of} texts {one if count == 1 else many}"
