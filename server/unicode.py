"""Which strings of a request are text. Enter at `check_text`, and at `beginning` for what is told back of others."""

SHOWN_CHARS = 64
"""Of a caller's own words in a message."""


def check_text(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is no character and which no tokenizer takes.

    Raises ValueError.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode, without unpaired surrogates") from error
    return text


def beginning(text: str, most_chars: int = SHOWN_CHARS) -> str:
    """What may be told back of a string that need not be text: a response could not hold half a surrogate pair."""
    return text[:most_chars].encode(errors="replace").decode()
