"""Forms as ACON's client sends them: multipart of a few small fields, and urlencoded."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from supervisor import FormatError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_FIELDS = 8
_ITEM = "form"


class _Collector:
    """What `MultipartParser` calls back; `fields` are complete ones, `ended` the last boundary."""

    def __init__(self) -> None:
        self.fields: dict[str, bytes] = {}
        self.ended = False
        self._header = bytearray()
        self._header_value = bytearray()
        self._name: str | None = None
        self._data = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value_part,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        if len(self.fields) >= _MAX_FIELDS:
            raise FormatError(_ITEM, "has few fields", expected=f"at most {_MAX_FIELDS}")
        self._name = None
        self._data = bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value_part(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            self._name = options.get(b"name", b"").decode("ascii", "replace")
        self._header.clear()
        self._header_value.clear()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _part_end(self) -> None:
        if not self._name:
            raise FormatError(_ITEM, "every part has a name")
        if self._name in self.fields:
            raise FormatError(_ITEM, "a field comes once", actual=self._name)
        self.fields[self._name] = bytes(self._data)

    def _end(self) -> None:
        self.ended = True


def parse_multipart(content_type: str, body: bytes) -> dict[str, bytes]:
    """Fields by name, each once, eight at most. Raises `FormatError`."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise FormatError(
            "Content-Type", "must be multipart/form-data with a boundary", actual=content_type[:160]
        )
    collector = _Collector()
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise FormatError(_ITEM, "must be well-formed multipart", actual=error) from None
    if not collector.ended:
        raise FormatError(_ITEM, "must be whole", actual="no closing boundary")
    return collector.fields


def parse_urlencoded(body: bytes) -> dict[str, str]:
    """Fields by name, each once, eight at most. Raises `FormatError`."""
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=_MAX_FIELDS,
        )
    except ValueError as error:
        raise FormatError(_ITEM, "must be well-formed urlencoded", actual=error) from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise FormatError(_ITEM, "a field comes once")
    return fields


def only_fields(
    fields: dict[str, bytes], *, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> None:
    """Refuse a form with missing or unknown fields."""
    names = set(fields)
    if not set(required) <= names <= {*required, *optional}:
        raise FormatError(
            _ITEM,
            "has the fields of this call and no others",
            expected=" ".join((*required, *optional)),
            actual=" ".join(sorted(names)),
        )
