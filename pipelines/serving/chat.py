"""Messages as the text that a model reads: by the model's own chat template, or in a plain form.

The plain form, for models without a template: `System: ...`, `User: ...` and `Assistant: ...`, an empty line after
each, and `Assistant:` at the end; what is written then ends before the next `User:`.
"""

import datetime
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipelines import storage
from pipelines.config import InputError

from .errors import ApiError
from .openai_schema import Message

_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
_TEMPLATE_FILE, _CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"


class ChatFormat:
    """How messages become a prompt. A template runs in a sandbox; it reaches no files and no network."""

    def __init__(
        self,
        template: str | None,
        special_tokens: dict[str, str] | None = None,
        own_names: Sequence[str] = (),  # of the tokenizer: by these a message could pass for others
    ) -> None:
        self._own_names = own_names
        self.stop_strings = () if template is not None else ("\n\nUser:", "\n\nSystem:")
        self._special_tokens = special_tokens or {}
        self._template: jinja2.Template | None = None
        if template is not None:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
            )
            environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
            try:
                self._template = environment.from_string(template)
            except jinja2.TemplateError as error:
                raise InputError(f"the model's chat template is not valid: {error}") from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text to read. ApiError where the template takes no such messages, or one holds a token's name."""
        everything = "\0".join(message.text for message in messages)  # of which none holds a NUL
        for name in self._own_names:
            if name in everything:
                reason = f"a message holds {name}, which the model knows as a token of its own; take it out"
                raise ApiError(400, "invalid_request", reason, "messages")
        if self._template is None:
            if any(message.name is not None for message in messages):
                raise ApiError(400, "unsupported_parameter", "name: this model's chats have no names", "messages")
            turns = [f"{_NAMES[message.role]}: {message.text}\n\n" for message in messages]
            return "".join([*turns, "Assistant:"])
        rows = [message.row() for message in messages]
        try:
            return self._template.render(messages=rows, add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # the border to a model's own program
            raise ApiError(
                400,
                "invalid_request",
                f"the model's chat template takes no such messages ({type(error).__name__})",
                "messages",
            ) from None


def load_chat_format(model: str, own_names: Sequence[str]) -> ChatFormat:
    """What a model's directory says: chat_template.jinja, or the chat_template of tokenizer_config.json. InputError."""
    try:
        file = storage.join(model, _CONFIG_FILE)
        config: Any = storage.read_json(file) if storage.exists(file) else {}
        file = storage.join(model, _TEMPLATE_FILE)
        template = storage.read_bytes(file).decode() if storage.exists(file) else config.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"the chat template of {model} cannot be read: {error}") from error
    if isinstance(template, list):  # several, each with a name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    tokens = {name: _token(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return ChatFormat(template, {name: token for name, token in tokens.items() if token is not None}, own_names)


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


class _Generation(Extension):
    """`{% generation %}`, by which Hugging Face marks what an assistant says: nothing is changed by it."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
