"""The requests of OpenAI's interface, as far as they are served, and those of sessions and summaries.

What is not served is refused: a parameter that OpenAI knows and this server does not passes only with the value that
asks for nothing (`n: 1`, `presence_penalty: 0`); unknown names are refused too.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

DEFAULT_TOKENS = 256  # written at most, where a request does not say and the server allows it
_MAX_TOKENS = f"none: {DEFAULT_TOKENS}, or as many as the server allows"

# OpenAI's parameters that are not served -> values that ask for nothing; null does so for all.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": (),
    "web_search_options": (),
}
# Fields of an answer's message that clients send back with it -> values that say nothing.
NEUTRAL_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}


def check_text(text: str) -> str:
    """The text; ValueError where it holds what no text does."""
    if "\0" in text:
        raise ValueError("holds a NUL character; give text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair; give Unicode text") from None
    return text


def _check_id(name: str) -> str:
    if name in (".", ".."):
        raise ValueError("is a path's part by which no session can be asked for")
    return name


_FIRST_FAULT = Field(fail_fast=True)  # of a long list: one is told, and to gather all would take gigabytes
Text = Annotated[str, pydantic.AfterValidator(check_text)]
SessionId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$"), pydantic.AfterValidator(_check_id)]
Flag = Annotated[bool, pydantic.BeforeValidator(lambda value: False if value is None else value)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class Body(pydantic.BaseModel):
    """A JSON body: the types as they are said, no others."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, values: Any) -> Any:
        return _without_neutral(values, {name: NEUTRAL[name] for name in NEUTRAL.keys() - cls.model_fields.keys()})


def _without_neutral(values: Any, neutral: Mapping[str, tuple[Any, ...]]) -> Any:
    """The fields without those that are not served but ask for nothing."""
    if not isinstance(values, dict):
        return values
    kept = {}
    for name, value in values.items():
        if name not in neutral:
            kept[name] = value
        elif value is not None and not any(
            type(value) is type(known) and value == known for known in _as(neutral[name])
        ):
            raise PydanticCustomError("unsupported", f"{name} is not served; leave it out", {"name": name})
    return kept


def _as(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The neutral values, a number also as a float."""
    return (*values, *(float(value) for value in values if type(value) is int))


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: Flag = False
    include_obfuscation: Literal[False] = False


class Writing(Body):
    """How text is written."""

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="equal seeds draw equal texts; without one it varies"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    ignore_eos: bool = Field(False, description="go on past the token that ends a text")
    stream: Flag = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Step(Writing):
    """A request that may belong to a session."""

    session_id: SessionId | None = Field(None, description="go on in this session, and leave it after what is written")
    request_id: str | None = Field(
        None, min_length=1, max_length=128, description="sent again to a session, the first result comes again"
    )
    expected_version: int | None = Field(None, ge=0, description="of the session; another one gives a 409")


class OpenAIRequest(Step):
    """What completions and chat completions share."""

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="taken and not used")
    safety_identifier: str | None = Field(None, max_length=256, description="taken and not used")
    prompt_cache_key: str | None = Field(None, max_length=256, description="taken and not used")


class CompletionRequest(OpenAIRequest):
    prompt: Text | Annotated[list[int], _FIRST_FAULT] | Annotated[list[Text], Field(min_length=1, max_length=1)]


class TextPart(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"]
    text: Text


class Message(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], _FIRST_FAULT]
    name: Annotated[Text, Field(max_length=64)] | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, values: Any) -> Any:
        return _without_neutral(values, NEUTRAL_IN_MESSAGES)

    def row(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.text, **({} if self.name is None else {"name": self.name})}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[Message], _FIRST_FAULT] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class CreateSession(Body):
    id: SessionId | None = Field(None, description="without one, a random one is made")


class ForkSession(Body):
    id: SessionId | None = Field(None, description="of the new session; without one, a random one is made")
    version: int | None = Field(None, ge=0, description="of the old session, one that is kept; none: the current one")


class AppendText(Body):
    text: Text = Field(description="read after what the session has read")
    stream: Flag = Field(False, description="progress as server-sent events")
    request_id: str | None = Field(None, min_length=1, max_length=128)
    expected_version: int | None = Field(None, ge=0)


class GenerateText(Writing):
    prompt: Text = Field("", description="read first")
    max_tokens: int | None = Field(None, ge=1, description=_MAX_TOKENS)
    request_id: str | None = Field(None, min_length=1, max_length=128)
    expected_version: int | None = Field(None, ge=0)


class SummaryRequest(Body):
    text: Text | None = Field(None, description="what to summarise; or give session_id")
    session_id: SessionId | None = Field(None, description="summarise what this session has read; it is left as it is")
    prompt: Text = Field("\n\nSummary: ", description="read after the text, before the summary is written")
    max_tokens: int | None = Field(None, ge=1, description=_MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int = Field(0, ge=-(2**63), lt=2**63)

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "SummaryRequest":
        if (self.text is None) == (self.session_id is None):
            raise ValueError("give either text or session_id")
        return self
