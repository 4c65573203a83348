"""Conversations as data sets write them, and as a model's chat template renders them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectrim.errors import SampleError, first_line

TURNS = ("messages", "conversations")  # keys of a row: the chat format of OpenAI, Hugging Face and TRL; of ShareGPT
Message = dict[str, Any]  # {"role": ..., "content": a string, or a list of {"type": "text" or "image", ...}}

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARK = "<image>"  # what LLaVA and ShareGPT write where an image stands
_PLACES = ("image", "image_url", "url", "path", "base64")  # keys of a part under which an image may be


@dataclass(frozen=True)
class Chat:
    """The turns of a conversation, and its images as the row names them, in order of appearance."""

    turns: tuple[Message, ...]
    images: tuple[Any, ...]


@dataclass(frozen=True)
class _Place:
    """The place of an image that the row gives beside the conversation; ``index`` says which one, if the row does."""

    index: Any = None


def question(text: str, images: int = 1) -> tuple[Message, ...]:
    """The conversation of one question about images."""
    return ({"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]},)


def joined(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row; TRL's "prompt" and "completion", where they are lists of turns, as one conversation."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) or not isinstance(completion, list | None) or row.get(TURNS[0]) is not None:
        return dict(row)
    others = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    return {**others, TURNS[0]: [*prompt, *(completion or ())]}


def read_chat(row: Mapping[str, Any], images: Sequence[Any] | None, where: str) -> Chat | None:
    """The conversation of a row that has one under "messages", "conversations" or "prompt", else None.

    A turn is ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}`` of system, user (human) or assistant
    (gpt); a string "system" beside the conversation is its first turn. Content is a string or a list of parts, each a
    text or an image. ``images`` are those that the row names beside the conversation: they take the places of image
    parts without an image of their own, in the order of their "index" if they have one, else of the marks ``<image>``
    in its texts, else they stand before the first user's text.

    Raises:
        SampleError: the conversation has another form, or its images and their places are not as many.
    """
    row = joined(row)
    keys = [key for key in TURNS if row.get(key) is not None]
    if not keys:
        return None
    if len(keys) > 1:
        raise SampleError(f'{where} has both "messages" and "conversations"; keep one of them')
    turns = row[keys[0]]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError(f'{where}: "{keys[0]}" must be a list of turns; write {{"role": "user", "content": "..."}}')
    if isinstance(system := row.get("system"), str) and system:
        turns = [{"role": "system", "content": system}, *turns]
    shown: list[Any] = []  # images, and places of those beside
    read = [_turn(turn, shown, where) for turn in turns]
    beside = list(images or ())
    if beside and not shown:
        read, shown = _placed(read, len(beside), where)
    places = [image for image in shown if isinstance(image, _Place)]
    if len(places) != len(beside):
        raise SampleError(
            f"{where} has {len(beside)} images and {len(places)} places for them in its conversation; write an image "
            "part or <image> for each"
        )
    order = [number if place.index is None else place.index for number, place in enumerate(places)]
    if not all(isinstance(number, int) for number in order) or {*order} != {*range(len(beside))}:
        raise SampleError(f"{where} counts its {len(beside)} images by the indices {order}; count each once, from 0")
    numbers = iter(order)
    return Chat(tuple(read), tuple(beside[next(numbers)] if isinstance(image, _Place) else image for image in shown))


def _turn(turn: Mapping[str, Any], shown: list[Any], where: str) -> Message:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(f"{where} has a turn of {role!r}; only those of system, user and assistant can be used")
    if turn.get("tool_calls") or not isinstance(content, str | list):
        raise SampleError(f"{where} has a turn whose content is neither a string nor a list of parts; rewrite it")
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": content}
    parts = []
    for part in content:
        held = [key for key in ("text", *_PLACES) if part.get(key) is not None] if isinstance(part, dict) else []
        kind = (part.get("type") or (held[0] if held else None)) if isinstance(part, dict) else part
        kind = "image" if kind in _PLACES else kind
        if not isinstance(part, dict) or kind not in ("text", "image"):
            raise SampleError(f"{where} has a part of type {str(kind)[:40]!r}; only text and images can be used")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise SampleError(f'{where} has a text part without a string under "text"; write one')
            parts.append({"type": "text", "text": part["text"]})
            continue
        places = [key for key in held if key != "text"]
        named = part[places[0]] if places else _Place(part.get("index"))
        shown.append({"base64": named} if places[:1] == ["base64"] else named)
        parts.append({"type": "image"})
    return {"role": _ROLES[role], "content": parts}


def _placed(turns: list[Message], images: int, where: str) -> tuple[list[Message], list[_Place]]:
    """The turns with image parts in place of marks, or before the first user's text where there are none."""
    lists = [{**turn, "content": as_parts(turn["content"])} for turn in turns]
    marks = sum(part["text"].count(_MARK) for turn in lists for part in turn["content"])
    if not marks:
        first = next((turn for turn in lists if turn["role"] == "user"), None)
        if first is None:
            raise SampleError(f"{where} has no turn of the user, to whom its images belong; add one")
        first["content"] = [*[{"type": "image"}] * images, *first["content"]]
        return lists, [_Place()] * images
    for turn in lists:
        parts: list[Any] = []
        for part in turn["content"]:
            for number, piece in enumerate(part["text"].split(_MARK)):
                parts += [{"type": "image"}] * (number > 0)
                if text := piece.strip("\n") if _MARK in part["text"] else piece:
                    parts.append({"type": "text", "text": text})
        turn["content"] = parts
    return lists, [_Place()] * marks


def as_parts(content: str | list[Any]) -> list[Any]:
    """Content of a turn as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def texts(turns: Sequence[Message]) -> list[str]:
    """All texts of a conversation."""
    return [part["text"] for turn in turns for part in as_parts(turn["content"]) if part["type"] == "text"]


def render(processor: Any, turns: Sequence[Message], where: str, *, answer_next: bool = False) -> str:
    """A conversation as the chat template of a processor or tokenizer writes it.

    Templates want strings or lists of parts, and may silently leave out content of the other form. So a form is used
    only if all texts come out, which is tested with marks in their places.

    Args:
        processor: has the template.
        turns: the conversation.
        where: names the conversation in errors.
        answer_next: end where the assistant's answer begins.

    Raises:
        SampleError: there is no template, it fails, or it leaves a text out.
    """
    if not getattr(processor, "chat_template", None):
        raise SampleError(
            f"{where} is a conversation and {type(processor).__name__} has no chat template for it; add one to the "
            "model's directory, or give single questions or plain text"
        )
    reasons = []
    for form in (lambda content: content, as_parts, _as_string):
        shaped = [{**turn, "content": form(turn["content"])} for turn in turns]
        marked, marks = _marked(shaped)
        try:
            if all(mark in _apply(processor, marked, answer_next) for mark in marks):
                return _apply(processor, shaped, answer_next)
        except Exception as error:  # of whatever kind a template fails with
            reasons.append(first_line(error))
    reason = reasons[0] if reasons else "it leaves out a text"
    raise SampleError(
        f"{where} cannot be rendered by the chat template of {type(processor).__name__} ({reason}); change its turns "
        "or the template"
    )


def _apply(processor: Any, turns: list[Message], answer_next: bool) -> str:
    return str(processor.apply_chat_template(turns, add_generation_prompt=answer_next, tokenize=False))


def _marked(turns: list[Message]) -> tuple[list[Message], list[str]]:
    """The turns with a mark in place of every text, and the marks."""
    marks: list[str] = []

    def mark() -> str:
        marks.append(f"mark{len(marks)}x")
        return marks[-1]

    return [
        {
            **turn,
            "content": mark()
            if isinstance(turn["content"], str)
            else [{**part, "text": mark()} if part["type"] == "text" else part for part in turn["content"]],
        }
        for turn in turns
    ], marks


def _as_string(content: str | list[Any]) -> str | list[Any]:
    """Content as one string; where it has an image, as it is."""
    parts = as_parts(content)
    return content if any(part["type"] == "image" for part in parts) else "".join(part["text"] for part in parts)
