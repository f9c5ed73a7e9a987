"""Compressed request bodies, decoded within a limit: one that would become huge is refused on the way."""

from __future__ import annotations

import zlib

from server.errors import BodyTooLargeError, ContentEncodingError, InvalidRequestError

_GZIP, _ZLIB, _RAW_DEFLATE = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
ENCODINGS = ("gzip", "deflate")


def decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """What the body was before `Content-Encoding: <encoding>`.

    Raises ContentEncodingError for an encoding, or several, that are not among ENCODINGS, BodyTooLargeError for more
    than `max_bytes`, and InvalidRequestError for what is not whole.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name in ("gzip", "x-gzip"):
        return _inflated(body, _GZIP, name, max_bytes)
    if name != "deflate":
        raise ContentEncodingError(f"Bodies may be encoded with one of {', '.join(ENCODINGS)}, or not at all.")
    # With zlib's header, as the standard says, or without, as some clients do.
    has_header = len(body) > 1 and body[0] & 0x0F == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    return _inflated(body, _ZLIB if has_header else _RAW_DEFLATE, name, max_bytes)


def _inflated(body: bytes, window_bits: int, name: str, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(window_bits)
    try:
        # One byte more, so that what is too large shows; zlib makes no more than it is asked for.
        text = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"The body is not in the encoding {name} that its header names.") from error
    if len(text) > max_bytes:
        raise BodyTooLargeError(f"The body is larger than {max_bytes} bytes when it is decoded.")
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequestError(f"The body is not one whole stream of the encoding {name} that its header names.")
    return text
