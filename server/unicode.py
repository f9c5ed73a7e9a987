"""Which strings of a request are text. Enter at `check_text`."""


def check_text(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is no character and which no tokenizer takes.

    Raises ValueError.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode, without unpaired surrogates") from error
    return text
