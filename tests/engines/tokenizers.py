"""Small tokenizers of the kinds that language models have, with a special token and one that was only added."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WORDS = ("\u2581a", "\u2581bc", "d", "\u2581", "ef")
_BYTES = {f"<0x{byte:02X}>": len(WORDS) + byte for byte in range(256)}
SPECIAL = "<|end|>"


def sentencepiece_like() -> Tokenizer:
    """Words that carry their leading space, all 256 bytes, and a special token; a text's first space is left out."""
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)} | _BYTES, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_added(tokenizer)


def metaspace() -> Tokenizer:
    """The same words without bytes, as the older form of SentencePiece's decoder has them."""
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    return with_added(tokenizer)


def byte_fallback() -> Tokenizer:
    """As Gemma's: every space is in the text."""
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)} | _BYTES, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return with_added(tokenizer)


def byte_level() -> Tokenizer:
    """One token a byte, and one of two that is no character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "ðŁ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("ð", "Ł")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_added(tokenizer)


def word_pieces() -> Tokenizer:
    """A space before every word that is not a later part of one."""
    tokenizer = Tokenizer(models.WordPiece(vocab={"a": 0, "##b": 1, "c": 2, ".": 3, "[UNK]": 4}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return with_added(tokenizer)


def word_ends() -> Tokenizer:
    """A mark at the end of every word, as GPT's first has it."""
    tokenizer = Tokenizer(models.BPE(vocab={"a</w>": 0, "b": 1, "c</w>": 2}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder()
    return with_added(tokenizer)


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


KINDS = {
    "byte-level": byte_level(),
    "sentencepiece": sentencepiece_like(),
    "metaspace": metaspace(),
    "byte fallback": byte_fallback(),
    "word pieces": word_pieces(),
    "word ends": word_ends(),
}
