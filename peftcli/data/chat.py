"""Chats as the model's own chat template writes them, with the answers marked by character position.

No template is known by name. What an assistant turn adds is found by rendering: up to the turn with the generation
prompt, as inference does; up to and including it; and once more with another text in its place, which shows what the
template itself puts before and after an answer. So glue such as an empty `<think></think>` is never learnt, and the
marker that ends a turn always is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from peftcli.data.formats import BadRow, checked_text, missing
from peftcli.data.readers import type_name
from peftcli.data.rows import Row
from peftcli.errors import DataError, ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
PROBE = "peftcli.probe"  # stands in for an answer; no template writes it by itself


@dataclass(frozen=True)
class Chat:
    """A rendered conversation: `text` as the model reads it and the (start, end) characters of each answer."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Turn:
    """A conversation up to and including one answer, which is `text[start:end]`; `marked` if something ends it."""

    text: str
    start: int
    end: int
    marked: bool


class Frame(NamedTuple):
    """What a template writes before and after the last message's content."""

    head: str
    tail: str


def messages_of(row: Row) -> list[Message]:
    """Returns the messages of a row; ShareGPT's `conversations` are converted.

    Raises:
        BadRow: The messages are not a list of known roles with text, or hold nothing to learn.
    """
    name = "messages" if "messages" in row else "conversations"
    if name not in row:
        raise missing(row, "messages")
    turns = row[name]
    if not isinstance(turns, list):
        raise BadRow(f"{name} is {type_name(turns)}, not a list")
    messages = [_message(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{name} has no assistant turn, so there is nothing to learn")
    first = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    if messages[first]["role"] != "user":
        raise BadRow(f"{name}[{first}] is from {messages[first]['role']}; the first turn must be the user's")
    return messages


def _message(turn: Any, name: str) -> Message:
    """Returns one checked message; keys that are null are left out."""
    if not isinstance(turn, dict):
        raise BadRow(f"{name} is {type_name(turn)}, not an object with role and content")
    message = {key: value for key, value in turn.items() if value is not None}
    if "from" in message and "role" not in message:
        role, content = message.pop("from"), message.pop("value", None)
        known = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        message = {"role": known, "content": content} | message
    role = message.get("role")
    if role not in ROLES:
        said = f'"{role}"' if isinstance(role, str) else type_name(role)
        close = did_you_mean(role, ROLES) if isinstance(role, str) else None
        raise BadRow(f"{name}.role is {said}", close or f"the roles are {', '.join(ROLES)}")
    content = message.setdefault("content", "" if message.get("tool_calls") else None)
    blank = not checked_text(content, f"{name}.content").strip()
    if blank and role in ("user", "assistant") and not message.get("tool_calls"):
        raise BadRow(f"{name}.content is empty", "fill in the turn or take the row out")
    return message


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises unless the tokenizer can render chats and say which characters each token covers."""
    if tokenizer.chat_template is None:
        raise DataError(
            "data.format: messages need a chat template, and the model's tokenizer has none",
            hint="use the model's instruct variant, or give the data as prompt and completion",
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} cannot say which characters a token covers, as chats need",
            hint="the model folder needs a tokenizer.json",
        )


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False, tools: Any = None
) -> str:
    """Returns messages as text, ending with the generation prompt if `prompt`.

    Raises:
        BadRow: The template refuses them.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False)
    except Exception as error:  # a template is a program, which the model's folder brings
        roles = ", ".join(message["role"] for message in messages)
        raise BadRow(f"the model's chat template refuses the turns {roles}: {error}") from error
    assert isinstance(text, str)
    return text


def render_answers(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, marks: re.Pattern[str], tools: Any = None
) -> list[Chat]:
    """Returns the conversation with its answers marked: one sample, or one for each answer.

    Args:
        messages: Checked messages; what comes after the last answer is left out.
        tokenizer: Has a chat template.
        marks: Matches the tokenizer's special tokens, see `special_tokens`.
        tools: The row's tools, for the template.

    Raises:
        BadRow: The template refuses the messages, or leaves an answer out.
    """
    turns = []
    for upto in answer_ends(messages):
        prefix = render(messages[: upto - 1], tokenizer, prompt=True, tools=tools)
        text = render(messages[:upto], tokenizer, tools=tools)
        frame = find_frame(messages[:upto], text, tokenizer, tools)
        turns.append(find_turn(messages[upto - 1], prefix, text, frame, marks))
    return chats_of(turns, tokenizer)


def answer_ends(messages: Sequence[Message]) -> list[int]:
    """Returns how many messages there are up to and including each answer."""
    return [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]


def chats_of(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Chat]:
    """Returns a conversation's turns as one sample, or as one for each answer.

    Several are needed where the template rewrites earlier turns (Qwen3 drops their thinking): each answer is then
    learnt in the very text that inference would have shown the model.
    """
    last = turns[-1]
    if all(last.text.startswith(turn.text[: turn.end]) for turn in turns):
        return [_chat(last, [(turn.start, turn.end) for turn in turns], tokenizer)]
    return [_chat(turn, [(turn.start, turn.end)], tokenizer) for turn in turns]


def _chat(turn: Turn, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Returns the sample that ends with `turn`; its end is marked with EOS where the template marks none."""
    checked_text(turn.text, "the rendered chat")  # tools and calls are checked in no other place
    if turn.marked:
        return Chat(turn.text, tuple(spans))
    text = turn.text[: turn.end] + end_of_text(tokenizer)
    return Chat(text, (*spans[:-1], (turn.start, len(text))))


def find_frame(
    messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase, tools: Any = None
) -> Frame | None:
    """Returns what comes before and after the last message's content in `text`, the conversation rendered.

    None where that is more than its content, or not its content as it is. Raises a BadRow like `render`.
    """
    answer = messages[-1]
    if answer.get("tool_calls"):
        return None
    probe = render([*messages[:-1], {**answer, "content": PROBE}], tokenizer, tools=tools)
    head, found, tail = probe.partition(PROBE)
    fits = found and text in [head + body + tail for body in bodies(answer)]
    return Frame(head, tail) if fits else None


def bodies(answer: Message) -> tuple[str, str]:
    """Returns an answer's content as templates write it: as it is, or without white space around it."""
    return answer["content"], answer["content"].strip()


def find_turn(answer: Message, prefix: str, text: str, frame: Frame | None, marks: re.Pattern[str]) -> Turn:
    """Returns a conversation with its last message, an answer, found in it.

    Args:
        answer: The last message.
        prefix: The messages before it, rendered with the generation prompt.
        text: All messages, rendered.
        frame: What is around the answer in `text`; None where that is not known.
        marks: Matches the tokenizer's special tokens.

    Raises:
        BadRow: The answer is not in `text`.
    """
    start = common_prefix(prefix, text)
    stripped = len(text.rstrip())
    if frame is None:
        end = max(start, stripped)
        if not text[start:end].strip():
            raise BadRow("the model's chat template leaves this answer out")
        return Turn(text, start, end, any(match.end() == end for match in marks.finditer(text, start)))
    content_end = len(text) - len(frame.tail)
    if answer.keys() <= {"role", "content"} and frame.head[start:].strip():  # white space is for the model to write
        start = len(frame.head)
    mark = marks.search(text, content_end)
    end = mark.end() if mark else max(content_end, stripped)
    return Turn(text, start, end, end > content_end)


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Returns how many characters or ids `a` and `b` share from the start."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Returns a pattern that matches any special token of the tokenizer, or nothing where it has none."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of the EOS token, without which a model cannot learn to stop."""
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no end-of-sequence token, so the model could not learn to stop")
    return str(tokenizer.eos_token)
