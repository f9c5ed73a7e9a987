"""Keys that open the server: kept as SHA-256 digests, compared in constant time. Enter at `KeyRing.load`."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from server.errors import ConfigurationError

_log = logging.getLogger(__name__)
_DIGEST_PREFIX = "sha256:"
_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_KEY_ID_CHARS = 12
_STRONG_CHARS = 16
"""Of a key that is not a word: with fewer, whoever may ask often enough finds it."""


class KeyRing:
    """A set of keys, of which only the digests are kept. Falsy when it is empty."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self._digests = frozenset(digests)

    @classmethod
    def load(cls, listed: str | None, file: Path | None, *, setting: str) -> KeyRing:
        """Keys from a setting, between commas or blanks, and from a file, one a line; `#` begins a comment line.

        A key is given as it is, or as `sha256:<hex digest>`; one that is short is warned of. Raises ConfigurationError,
        which never shows a key.
        """
        digests = [_digest(word, f"{setting}: key {i}") for i, word in enumerate(re.split(r"[,\s]+", listed or ""), 1)
                   if word]  # fmt: skip
        if file is not None:
            try:
                lines = file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"{setting}_file: cannot read {file} ({error})") from error
            stripped = [(number, line.strip()) for number, line in enumerate(lines, 1)]
            digests += [
                _digest(line, f"{setting}_file: {file} line {number}")
                for number, line in stripped
                if line and not line.startswith("#")
            ]
        if not digests and (listed is not None or file is not None):
            # Whoever names keys wants the server closed; none at all would leave it open.
            raise ConfigurationError(f"{setting}: keys were asked for, but there is none")
        return cls(digests)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __or__(self, other: KeyRing) -> KeyRing:
        return KeyRing(self._digests | other._digests)

    def __and__(self, other: KeyRing) -> KeyRing:
        return KeyRing(self._digests & other._digests)

    def __contains__(self, key_id: str) -> bool:
        """Whether it has a key of this id, as `find` gives it."""
        return any(digest.hex()[:_KEY_ID_CHARS] == key_id for digest in self._digests)

    def find(self, presented: bytes) -> str | None:
        """The id of the key that was presented, which is the beginning of its digest; None if it is not one of these.

        Bytes are compared, whatever encoding or case they are in, and always with every key.
        """
        digest = hashlib.sha256(presented).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:_KEY_ID_CHARS] if any(matches) else None


def _digest(word: str, where: str) -> bytes:
    if word.startswith(_DIGEST_PREFIX):
        hexadecimal = word.removeprefix(_DIGEST_PREFIX)
        if not re.fullmatch(r"[0-9a-fA-F]{64}", hexadecimal):
            raise ConfigurationError(f"{where}: sha256: must be followed by 64 hexadecimal digits")
        return bytes.fromhex(hexadecimal)
    if not _KEY.fullmatch(word):
        raise ConfigurationError(f"{where}: a key is 1 to 512 visible ASCII characters")
    if len(word) < _STRONG_CHARS:
        _log.warning(
            "%s: it has %d characters and can be guessed; give %d or more, such as those of `openssl rand -hex 32`",
            where, len(word), _STRONG_CHARS,
        )  # fmt: skip
    return hashlib.sha256(word.encode()).digest()
