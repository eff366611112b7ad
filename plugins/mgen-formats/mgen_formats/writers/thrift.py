"""Thrift's compact protocol, in which a Parquet file tells of itself.

A struct is a dict from the number of a field to its type and value; a list is the type of its items
and these. What they mean is not known here. (thrift-compact-protocol.md of Apache Thrift)
"""

from __future__ import annotations

from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

Struct = dict[int, tuple[int, Any]]


class Reading:
    """Values, one behind the other, from bytes of which nothing is trusted."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def struct(self) -> Struct:
        """Raises `ValueError` or `IndexError` for what is no struct."""
        found: Struct = {}
        number = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            number = number + step if step else self._integer()
            found[number] = kind, kind == TRUE if kind <= FALSE else self._value(kind)
        return found

    def _value(self, kind: int) -> Any:
        if kind in (I16, I32, I64):
            return self._integer()
        if kind == BINARY:
            return self._take(self.varint())
        if kind in (LIST, SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return head & 15, [self._value(head & 15) for _ in range(count)]
        if kind == STRUCT:
            return self.struct()
        if kind in (TRUE, FALSE, BYTE):  # a truth in a list
            return self._byte()
        if kind == DOUBLE:
            return self._take(8)
        raise ValueError(f"type {kind} at byte {self.at}")

    def varint(self) -> int:
        """A whole number of at least 0."""
        found = shift = 0
        while (byte := self._byte()) & 0x80:
            found |= (byte & 0x7F) << shift
            shift += 7
        return found | byte << shift

    def _integer(self) -> int:
        found = self.varint()
        return found >> 1 ^ -(found & 1)

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _take(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise ValueError(f"{count} bytes at the end of {len(self.data)}")
        return self.data[self.at - count : self.at]


def dumped(struct: Struct) -> bytes:
    """A struct as bytes."""
    written = bytearray()
    last = 0
    for number, (kind, value) in sorted(struct.items()):
        kind = kind if kind > FALSE else TRUE if value else FALSE
        step = number - last
        written += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + _integer(number)
        written += b"" if kind <= FALSE else _dumped(kind, value)
        last = number
    return bytes(written) + b"\0"


def _dumped(kind: int, value: Any) -> bytes:
    if kind in (I16, I32, I64):
        return _integer(value)
    if kind == BINARY:
        return varint(len(value)) + bytes(value)
    if kind in (LIST, SET):
        inner, items = value
        few = len(items) < 15
        head = bytes([(len(items) if few else 15) << 4 | inner])
        head += b"" if few else varint(len(items))
        return head + b"".join(_dumped(inner, item) for item in items)
    if kind == STRUCT:
        return dumped(value)
    return bytes(value) if kind == DOUBLE else bytes([value])


def varint(value: int) -> bytes:
    """A whole number of at least 0, seven bits a byte, the low ones first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _integer(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)
