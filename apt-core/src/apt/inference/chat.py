"""A conversation: turns become a prompt by the model's own template, and what was read stays read.

The template is Jinja text that came with the weights, so it runs in a sandbox that reaches nothing but the conversation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

import torch

from apt.core.hooks import HookRunner
from apt.core.providers import Tokenizer
from apt.core.special import SpecialIds
from apt.errors import UserError
from apt.hookspecs import RunState
from apt.inference.context import Context
from apt.inference.generate import NOWHERE, USUAL, Row, check_numbers, check_text, draw, inference
from apt.inference.sampling import Sampling
from apt.inference.stream import TextStream
from apt.modeling.encoder_decoder import EncoderDecoder
from apt.modeling.model import Decoder


class Message(TypedDict):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str


@runtime_checkable
class ChatTokenizer(Protocol):
    """What a tokenizer has beside the usual where its model was trained on conversations."""

    chat_template: str | None
    settings: Mapping[str, object]
    """Special tokens by their role, such as bos_token."""

    def encode_marked(self, text: str) -> Sequence[int]:
        """Ids of a text in which special tokens stand as such."""


def render(tokenizer: Tokenizer, messages: Sequence[Message], template: str | None = None) -> str:
    """The prompt that asks for the assistant's next turn. Raises `UserError` where there is no template, or it fails."""
    settings: Mapping[str, object] = {}
    if isinstance(tokenizer, ChatTokenizer):
        template = tokenizer.chat_template if template is None else template
        settings = tokenizer.settings
    if template is None:
        raise UserError(
            "this model's tokenizer has no chat template; give one with --template FILE (Jinja), or use apt-core generate, "
            "which goes on from a text"
        )
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("chat templates are read by jinja2: pip install 'apt-core[chat]'") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    class Generation(Extension):
        """What stands between `generation` and `endgeneration` is the assistant's: a mark for training, and no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def to_json(value: object, ensure_ascii: bool = False, **how: Any) -> str:
        # Jinja's own filter escapes < and >, which would change the prompt.
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    extensions = [loopcontrols, Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    words = {key: _word(value) for key, value in settings.items() if key.endswith("_token")}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **words)
    except Exception as error:  # it is code, and may err like any
        raise UserError(f"the chat template refuses this conversation: {error}") from error


class Chat:
    """A conversation with a model.

    `say` yields the reply in pieces, as they come; the turn is part of the conversation even where the reader stops early. Turns
    that the context has no room for are left out from the start, the system's excepted; `left_out` counts them.

    Raises `UserError` for an encoder-decoder, for a template that is missing or fails, for numbers out of range, and where the
    context has no room for what the system says.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        template: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling,
        seed: int = 0,
        special: SpecialIds = USUAL,
        hooks: HookRunner | None = None,
        state: RunState = NOWHERE,
    ) -> None:
        if isinstance(model, EncoderDecoder):
            raise UserError(
                "chat is for decoders, and this model is an encoder-decoder, which writes one target for a source; "
                "use apt-core generate"
            )
        check_numbers(max_new_tokens, seed)
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.max_new_tokens, self.sampling, self.special, self.state = max_new_tokens, sampling, special, state
        self.hooks = HookRunner() if hooks is None else hooks
        self.left_out = 0
        self.generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
        self._context: Context | None = None
        # Refused before anybody types.
        least, limit = len(self._encode([*self.messages, {"role": "user", "content": ""}])), model.max_seq_len
        if least > limit:
            what = "the system's prompt" if self.messages else "the chat template"
            raise UserError(f"{what} alone takes {least} tokens; the model's context has room for {limit}")

    def say(self, text: str) -> Generator[str, None, None]:
        """The model's reply to `text`. Raises `UserError` where it is too long or no UTF-8, and forgets it."""
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._prompt()
        except BaseException:
            self.messages.pop()
            raise
        row = Row(ids, self.generator)
        stream = TextStream(self.tokenizer)
        pieces: list[str] = []
        try:
            with inference(self.model):
                context = self._read(ids)
                tokens = draw(
                    context, [row], self.sampling, self.special.stop, self.max_new_tokens, self.hooks, self.state
                )
                for (token,) in tokens:
                    if token is not None and (piece := stream.add(token)):
                        pieces.append(piece)
                        yield piece
                if piece := stream.end():
                    pieces.append(piece)
                    yield piece
        except GeneratorExit:
            raise  # between two tokens: what was read is whole
        except BaseException:
            self._context = None  # some of the layers may have read a token that the others have not
            raise
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def clear(self) -> None:
        """Forget all turns but the system's."""
        self.messages = [each for each in self.messages if each["role"] == "system"]
        self.left_out, self._context = 0, None

    def _prompt(self) -> list[int]:
        """The conversation's ids, without the oldest turns where it does not fit."""
        limit = self.model.max_seq_len
        reserve = min(self.max_new_tokens, limit // 2)
        first = sum(each["role"] == "system" for each in self.messages)
        least = len(self._encode([*self.messages[:first], self.messages[-1]]))
        if least > limit:
            raise UserError(f"this message has {least} tokens; the model's context has room for {limit}")
        while len(ids := self._encode(self.messages)) > limit - reserve and len(self.messages) > first + 1:
            del self.messages[first : first + 2]
            self.left_out += 2
        return ids

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        text = render(self.tokenizer, messages, self.template)
        encode = self.tokenizer.encode_marked if isinstance(self.tokenizer, ChatTokenizer) else self.tokenizer.encode
        return list(encode(check_text(text)))

    def _read(self, ids: list[int]) -> Context:
        """A context that holds `ids`: the one there is, where they go on from what it has read."""
        held = None if self._context is None else self._context.texts[0]
        if held is not None and self._context is not None and ids[: len(held)] == held and len(ids) > len(held):
            self._context.extend(ids[len(held) :])
        else:
            self._context = Context(self.model, [ids], self.model.max_seq_len, self.special.pad)
        return self._context


def _word(token: object) -> object:
    """A special token, which some files give as an object."""
    return token["content"] if isinstance(token, Mapping) and "content" in token else token
