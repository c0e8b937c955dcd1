"""Many chats rendered at once: what `chat.render_answers` returns for each of them, for a third of the time.

A template is called for all conversations of a chunk together, and what it writes around an answer is asked for once
for each shape of a conversation instead of once for each answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from peftcli.data.chat import (
    Chat,
    Frame,
    Message,
    answer_ends,
    bodies,
    chats_of,
    find_frame,
    find_turn,
    render_answers,
    special_tokens,
)
from peftcli.data.formats import BadRow

if TYPE_CHECKING:
    import re

    from transformers import PreTrainedTokenizerBase

Shape: TypeAlias = tuple[tuple[Any, ...], ...]
"""The roles of a conversation's messages, and the fields that each has."""


@dataclass(frozen=True)
class Conversation:
    """The checked messages of a row, and the tools that it offers the model."""

    messages: Sequence[Message]
    tools: list[Any] | None = None


@dataclass
class Renderer:
    """Renders conversations with one tokenizer's template.

    Attributes:
        tokenizer: Has a chat template.
        marks: Matches its special tokens.
        frames: What the template wrote around the answer, for each shape of a conversation that was met: between the
            generation prompt and the content, and after the content.
    """

    tokenizer: PreTrainedTokenizerBase
    marks: re.Pattern[str] = field(init=False)
    frames: dict[Shape, Frame] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.marks = special_tokens(self.tokenizer)

    def answers(self, conversations: Sequence[Conversation]) -> list[list[Chat] | BadRow]:
        """Returns the samples of each conversation, or why it has none; see `chat.render_answers`."""
        plain = [one.messages for one in conversations if one.tools is None]
        ends = [answer_ends(messages) for messages in plain]
        pairs = [(messages, upto) for messages, stops in zip(plain, ends, strict=True) for upto in stops]
        prefixes = self._render_all([messages[: upto - 1] for messages, upto in pairs], prompt=True)
        texts = self._render_all([messages[:upto] for messages, upto in pairs], prompt=False)
        if prefixes is None or texts is None:  # each by itself, to learn which
            return [self._attempt(one, None) for one in conversations]
        rendered = iter(zip(prefixes, texts, strict=True))
        found: list[list[Chat] | BadRow] = []
        for one in conversations:
            turns = None if one.tools is not None else [next(rendered) for _ in answer_ends(one.messages)]
            found.append(self._attempt(one, turns))
        return found

    def _render_all(self, conversations: list[Sequence[Message]], *, prompt: bool) -> list[str] | None:
        """Returns all as text; None where the template refuses one of them."""
        if not conversations:
            return []
        try:
            texts: Any = self.tokenizer.apply_chat_template(
                [list(messages) for messages in conversations], add_generation_prompt=prompt, tokenize=False
            )
        except Exception:  # whatever it is, it is raised again, and judged, for the one that it is about
            return None
        return list(texts)

    def _attempt(self, one: Conversation, turns: Sequence[tuple[str, str]] | None) -> list[Chat] | BadRow:
        """Returns the samples of one conversation, whose (prefix, text) for each answer may be known already."""
        try:
            if turns is None:
                return render_answers(one.messages, self.tokenizer, self.marks, one.tools)
            found = []
            for upto, (prefix, text) in zip(answer_ends(one.messages), turns, strict=True):
                messages = one.messages[:upto]
                found.append(find_turn(messages[-1], prefix, text, self._frame(messages, prefix, text), self.marks))
            return chats_of(found, self.tokenizer)
        except BadRow as bad:
            return bad

    def _frame(self, messages: Sequence[Message], prefix: str, text: str) -> Frame | None:
        """Returns what is around the last message's content in `text`.

        What another conversation of this shape has shown is taken where it explains the whole of `text`: the rendered
        prefix, what comes between, the content, what comes after. Else the template is asked.
        """
        answer = messages[-1]
        shape = tuple((message["role"], *message) for message in messages)
        known = self.frames.get(shape)
        if known is not None and text in [prefix + known.head + body + known.tail for body in bodies(answer)]:
            return Frame(prefix + known.head, known.tail)
        frame = find_frame(messages, text, self.tokenizer)
        if frame is not None and frame.head.startswith(prefix):
            self.frames[shape] = Frame(frame.head[len(prefix) :], frame.tail)
        return frame
