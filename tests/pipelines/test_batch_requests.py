"""OpenAI Batch lines: what they ask for is taken or refused, never ignored; results have the official shape."""

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from pipelines.data.batch_requests import Answer, Line, Request, read_line, result_line
from pipelines.data.read import Document, Fault


def read(body: Any, **others: Any) -> Line:
    line = {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body, **others}
    return read_line("in.jsonl", 3, json.dumps(line).encode())


def text(line: Line) -> str:
    assert isinstance(line.document, Document), line.document
    return b"".join(line.document.chunks).decode()


def test_the_text_is_that_of_messages_prompt_or_input() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]
    assert text(read({"model": "m", "messages": messages})) == "Be short.\n\none\ntwo"
    assert text(read({"prompt": "a book"}, url="/v1/completions")) == "a book"
    assert text(read({"prompt": ["a book"]}, url="/v1/completions")) == "a book"
    assert text(read({"input": "a book"}, url="/v1/responses")) == "a book"
    assert text(read({"input": [{"role": "user", "content": "a book"}]}, url="/v1/responses")) == "a book"


def test_the_id_is_the_custom_id_and_settings_are_the_requests() -> None:
    line = read({"prompt": "x", "max_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": 3}, url="/v1/completions")
    assert line.request == Request("/v1/completions", 7, 0.0, 0.5, 3)
    assert line.document.document_id == "r-1"
    nothing = {"presence_penalty": 0.0, "frequency_penalty": 0, "response_format": {"type": "text"}, "tools": []}
    assert read({"prompt": "x", **nothing}).request == Request("/v1/chat/completions")
    assert read({"messages": [{"content": "x"}], "n": 1, "stream": False, "user": "u"}).request == Request(
        "/v1/chat/completions"
    )


@pytest.mark.parametrize(
    ("body", "others", "said"),
    [
        ("text", {}, "`body` is str"),
        ({"prompt": "x"}, {"url": "/v1/embeddings"}, "`url` is '/v1/embeddings'"),
        ({"prompt": "x"}, {"method": "GET"}, "`method`"),
        ({}, {}, "needs one of"),
        ({"prompt": "x", "input": "y"}, {}, "needs one of"),
        ({"prompt": "x", "tools": [1]}, {}, "`body.tools` is [1]"),
        ({"prompt": "x", "presence_penalty": 1}, {}, "`body.presence_penalty` is 1"),
        ({"prompt": "x", "temperature": 10**400}, {}, "a number from 0"),
        ({"prompt": "x", "top_p": -(10**400)}, {}, "a number from 0"),
        ({"prompt": "x", "n": 2}, {}, "`body.n` is 2"),
        ({"prompt": "x", "stream": True}, {}, "`body.stream`"),
        ({"prompt": "x", "max_tokens": 0}, {}, "whole number from 1"),
        ({"prompt": "x", "max_tokens": True}, {}, "whole number from 1"),
        ({"prompt": "x", "max_tokens": 10**15}, {}, "whole number from 1 to 1048576"),
        ({"prompt": "x", "max_tokens": 2, "max_completion_tokens": 3}, {}, "differ"),
        ({"prompt": "x", "temperature": -1}, {}, "a number from 0"),
        ({"prompt": "x", "temperature": float("nan")}, {}, "a number from 0"),
        ({"prompt": "x", "top_p": 0}, {}, "above 0"),
        ({"prompt": ["x", "y"]}, {}, "one string"),
        ({"messages": "x"}, {}, "holds no text"),
        ({"messages": [{"content": [{"type": "image_url"}]}]}, {}, "no text"),
        ({"messages": ["x"]}, {}, "no text"),
    ],
)
def test_what_cannot_be_done_is_said(body: Any, others: dict[str, Any], said: str) -> None:
    line = read(body, **others)
    assert isinstance(line.document, Fault)
    assert said in line.document.reason
    assert line.custom_id == "r-1"
    assert line.request is not None  # so that it gets a result line


def test_lines_with_text_stay_documents() -> None:
    line = read_line("in.jsonl", 1, b'{"text": "x", "custom_id": "y"}')
    assert (line.request, text(line)) == (None, "x")
    assert isinstance(read_line("in.jsonl", 1, b"{}").document, Fault)
    assert read_line("in.jsonl", 1, b"{}").request is None


def answer(url: str, **others: Any) -> Answer:
    values = {"text": "short", "error": None, "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 2}
    return Answer(**{"custom_id": "r", "url": url, "model": "m", "created_unix_s": 5, **values, **others})


@pytest.mark.parametrize(("url", "kind"), [("/v1/chat/completions", ChatCompletion), ("/v1/completions", Completion)])
def test_results_are_what_the_official_client_reads(url: str, kind: Any) -> None:
    line = result_line(answer(url))
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("r", None, 200)
    body = kind.model_validate(line["response"]["body"])
    choice = body.choices[0]
    assert (choice.message.content if kind is ChatCompletion else choice.text) == "short"
    assert (choice.finish_reason, body.usage.total_tokens) == ("stop", 11)


def test_a_result_for_responses_has_its_output_text() -> None:
    body = result_line(answer("/v1/responses", finish_reason="length"))["response"]["body"]
    assert Response.model_construct(**body).output_text == "short"
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_failed_one_has_an_error_and_no_response() -> None:
    line = result_line(answer("/v1/completions", text=None, error="too dark"))
    assert (line["response"], line["error"]["message"]) == (None, "too dark")
