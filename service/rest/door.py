"""``POST /predict/{model}``: a model asked in its own terms, as a plain ASGI callable.

What a body and an answer mean is said by ``model.yaml``, see `service.meaning`; without it the
signature says enough for names, numbers and texts.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from urllib.parse import parse_qs

from service.errors import InvalidArgument, NotFound
from service.predictor import Decoded, ModelRef, Prediction, Predictor
from service.rest.door_answer_codec import answer_types, answers_of, choose_type, encode_answers
from service.rest.door_body_codec import CSV_TYPE, JSON_TYPE, TEXT_TYPE, MediaType, decode_body, media_type, seen_type
from service.rest.door_fields import asked_signature, check_type, columns_of
from service.rest.door_records_codec import decode_records
from service.rest.http import (
    Asgi,
    Receive,
    Scope,
    Send,
    answer_content,
    answer_not_post,
    deadline,
    guarded,
    header,
    read_body,
    timing_header,
)
from service.rest.openinference import model_ref
from service.rest.options import RestOptions
from service.tensors import Signature

DOOR = "/predict/"
PROTOCOL = "rest-predict"
_CONTENT_TYPES = {TEXT_TYPE: "text/plain; charset=utf-8", CSV_TYPE: "text/csv; charset=utf-8"}
_ROUTE = re.compile(r"/predict/([^/]+)(?:/versions/([^/]+)|/labels/([^/]+))?")

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a form that is broken is its caller's to know


def door_app(predictor: Predictor, options: RestOptions) -> Asgi:
    """The ASGI callable for ``POST /predict/{m}[/versions/{v}|/labels/{l}][?signature={s}]``."""

    async def predict(scope: Scope, receive: Receive, send: Send) -> None:
        match = _ROUTE.fullmatch(scope["path"])
        if match is None:
            raise NotFound(f"there is no {scope['path']}")
        if scope["method"] != "POST":
            await answer_not_post(scope, send)
            return
        try:
            ref = ModelRef(match[1], None, match[3]) if match[3] else model_ref(match[1], match[2])
        except NotFound as error:
            predictor.refused(PROTOCOL, error)
            raise
        with predictor.request(ref, PROTOCOL) as request:
            due = deadline(scope, options.request_timeout_s)
            media = media_type(header(scope, b"content-type"))
            asked = _Asked(media, _accept(scope), _signature_name(scope), options)
            asked.body = await read_body(scope, receive, options.max_message_bytes)
            predictions = await request.predict_apart(due, asked.decode)
            content = await asyncio.to_thread(asked.encode, predictions)
        headers = [(b"content-type", _CONTENT_TYPES.get(asked.answer_type, asked.answer_type).encode())]
        headers.append((b"vary", b"accept"))
        headers.append(timing_header(predictions[0].spent))
        await answer_content(scope, send, content, headers, options.gzip_min_bytes)

    return guarded(predict)


class _Asked:
    """One request: what came, and what is to be answered. Its methods take long for large images."""

    def __init__(self, media: MediaType, accept: str | None, signature_name: str, options: RestOptions) -> None:
        self.body = b""
        self.answer_type = JSON_TYPE
        self._media = media
        self._accept = accept
        self._signature_name = signature_name
        self._options = options
        self._is_list = False
        self._count = 0

    def decode(self, signatures: Mapping[str, Signature]) -> list[Decoded]:
        """The body as tensors; also decides in which media type the answer will be."""
        signature = asked_signature(signatures, self._signature_name)
        media = seen_type(self._media, self.body)
        check_type(media.name, signature)
        self.answer_type = choose_type(self._accept, answer_types(signature))
        records = decode_body(self.body, media, self._options.max_json_depth, lambda: columns_of(signature))
        self._is_list, self._count = records.is_list, len(records.records)
        return decode_records(records, signature, self._options.bounds, len(self.body))

    def encode(self, predictions: list[Prediction]) -> bytes:
        """The body of the answer."""
        answers = answers_of(predictions, self._count)
        return encode_answers(answers, predictions[0].signature, self.answer_type, is_list=self._is_list)


def _accept(scope: Scope) -> str | None:
    """All that the caller accepts; the header may come in several lines."""
    lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"accept"]
    return ", ".join(lines) if lines else None


def _signature_name(scope: Scope) -> str:
    """The query parameter `signature`.

    Raises:
        InvalidArgument: another parameter is given, or this one twice.
    """
    try:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True, max_num_fields=16)
    except ValueError as error:
        raise InvalidArgument(f"query: {error}") from None
    names: list[str] = query.pop("signature", [""])
    if query or len(names) != 1:
        given = ", ".join(map(repr, query)) or "'signature' several times"
        raise InvalidArgument(f"query: the parameter 'signature' once expected, got {given}")
    return names[0]
