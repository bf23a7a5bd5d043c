"""HTTP responses, well-formed and not, without any network (W8)."""

from __future__ import annotations

from unittest import mock

from twisted.trial.unittest import SynchronousTestCase

from guixd.net.http1 import (
    LONGEST_HEAD,
    LONGEST_LINE,
    MOST_INTERIM,
    BadResponse,
    ResponseHead,
    ResponseReader,
    parse_head,
)


class _Told:
    """What a reader tells, as a list."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def head(self, head: ResponseHead) -> None:
        self.events.append(head.status)

    def data(self, data: bytes) -> None:
        if self.events and isinstance(self.events[-1], bytes):
            data = self.events.pop() + data  # type: ignore[operator]
        self.events.append(data)

    def end(self) -> None:
        self.events.append("end")


def read(data: bytes, step: int | None = None) -> list[object]:
    told = _Told()
    reader = ResponseReader(told)
    for begin in range(0, len(data), step or len(data)):
        reader.feed(data[begin : begin + (step or len(data))])
    if not reader.closed():
        told.events.append("cut")
    return told.events


class ResponsesTest(SynchronousTestCase):
    def test_how_bodies_end(self) -> None:
        """W8, U14: by length, by chunks, by the end; one after the other, in any pieces."""
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked += b"3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nX: y\r\n\r\n"
        sized = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"
        empty = b"HTTP/1.1 204 Empty\nServer: x\n\n"
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        closed = b"HTTP/1.0 200 OK\r\n\r\nrest"
        data = chunked + sized + empty + interim + closed
        expected = [200, b"abcde", "end", 404, b"no", "end", 204, "end", 200, b"rest", "end"]
        for step in (None, 1, 7):
            self.assertEqual(read(data, step), expected)
        for cut in (chunked[:-3], sized[:-1], sized[:10]):
            self.assertEqual(read(cut)[-1], "cut")

    def test_what_is_no_response(self) -> None:
        """W8"""
        start = b"HTTP/1.1 200 OK\r\n"
        chunked = start + b"Transfer-Encoding: chunked\r\n\r\n"
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        for text, *wrong in (
            (
                "this is not an answer of HTTP/1.1",
                *(b"SSH-2.0-x\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 099 X\r\n\r\n"),
            ),
            (
                "a field of the answer's head is not well-formed",
                *(start + b"no colon\r\n\r\n", start + b" folded: x\r\n\r\n"),
            ),
            (
                "the answer has two lengths",
                start + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
            ),
            (
                "the length of the answer is not a number",
                *(
                    start + b"Content-Length: " + length + b"\r\n\r\n"
                    for length in (b"-5", b"5, 5", b"1" * 16, b"\xb2", b"")
                ),
            ),
            (
                "the transfer encoding 'gzip, chunked' is unknown",
                start + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
            ),
            ("a chunk has no size", *(chunked + size for size in (b"x\r\n", b"-1\r\n", b"\r\n"))),
            ("a chunk is longer than it should be", chunked + b"1\r\nabc\r\n"),
            ("a line is too long", chunked + b"1" * LONGEST_LINE),
            (
                "the trailer is too long",
                chunked + b"0\r\n" + b"a" * 15 + b"\n" + (b"b" * 16 + b"\n") * (LONGEST_HEAD // 16),
            ),
            (
                "the head of the answer is too long",
                *(start + b"X: " + b"x" * LONGEST_HEAD, b"x" * LONGEST_HEAD),
            ),
            (
                "too many answers before the real one",
                *(interim * (MOST_INTERIM + 1), b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
            ),
        ):
            for data in wrong:
                with self.assertRaises(BadResponse, msg=data[:60]) as caught:
                    read(data)
                self.assertEqual(str(caught.exception), text)

    def test_what_is_just_short_enough(self) -> None:
        """W8"""
        start, end = b"HTTP/1.1 200 OK\r\n", b"Content-Length: 0\r\n\r\n"
        chunked = start + b"Transfer-Encoding: chunked\r\n\r\n"
        for data in (
            b"HTTP/1.1 100 Continue\r\n\r\n" * MOST_INTERIM + start + end,
            start + b"X: " + b"x" * (LONGEST_HEAD - len(start + end) - 5) + b"\r\n" + end,
            chunked + b"0;" + b"x" * (LONGEST_LINE - 4) + b"\r\n\r\n",
            chunked + b"0\r\n" + (b"b" * 16 + b"\n") * (LONGEST_HEAD // 16) + b"\n",
        ):
            self.assertEqual(read(data), [200, "end"])
            self.assertEqual(read(data, 1000), [200, "end"])
        self.assertEqual(parse_head(start + b"Content-Length: " + b"1" * 15).size, int("1" * 15))

    def test_heads(self) -> None:
        """W8: fields, phrases, lengths, and whether another answer may follow."""
        head = parse_head(b"HTTP/1.1 404 Not Found\r\nA: x \r\na:y\nContent-Length: 5")
        self.assertEqual((head.status, head.phrase, head.size), (404, "Not Found", 5))
        self.assertEqual((head.get("a"), head.get("b")), ("x, y", ""))
        for text in (b"HTTP/1.1 200", b"HTTP/1.1 200 "):
            self.assertEqual(parse_head(text).phrase, "")
        length, chunked = "Content-Length: 5", "Transfer-Encoding: Chunked"
        for version, fields, size, persistent in (
            ("1.1 200", (), None, False),
            ("1.1 200", (length,), 5, True),
            ("1.1 200", (length, length), 5, True),
            ("1.1 200", (chunked,), None, True),
            ("1.1 200", (length, chunked), None, False),
            ("1.1 200", (length, "Connection: x, Close"), 5, False),
            ("1.0 200", (length,), 5, False),
            ("1.0 200", (length, "Connection: x , Keep-Alive"), 5, True),
            ("1.0 200", ("Connection: keep-alive",), None, False),
            ("1.1 204", (length,), 0, True),
            ("1.1 304", (length,), 0, True),
            ("1.1 305", (length,), 5, True),
        ):
            head = parse_head("\r\n".join([f"HTTP/{version} OK", *fields]).encode())
            told = (head.size, head.persistent)
            self.assertEqual(told, (size, persistent), (version, fields))

    def test_small_chunks(self) -> None:
        """W8: a server that sends many costs others next to nothing."""
        told = _Told()
        with mock.patch.object(told, "data", wraps=told.data) as data:
            reader = ResponseReader(told)
            reader.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            reader.feed(b"1\r\nx\r\n" * 1000)
            self.assertEqual((told.events, data.call_count), ([200, b"x" * 1000], 1))
            with self.assertRaises(BadResponse):
                reader.feed(b"1\r\ny\r\nz")
                reader.feed(b"\r\n")
        self.assertEqual(told.events, [200, b"x" * 1000 + b"y"])

    def test_idle(self) -> None:
        """W8: nothing has come that has not ended, also between an interim answer and the real."""
        reader = ResponseReader(_Told())
        self.assertTrue(reader.idle)
        for data, idle in (
            (b"HTTP/1.1 100 C\r\n\r\n", False),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", False),
            (b"x", False),
            (b"x", True),
            (b"HT", False),
        ):
            reader.feed(data)
            self.assertEqual(reader.idle, idle)
