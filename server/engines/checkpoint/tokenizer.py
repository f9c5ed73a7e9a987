"""A model folder's tokenizer, as text and structure need it, and which of its tokens end a text or stand for none.

Enter at `load_tokenizer`.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.engines.checkpoint.inspection import one_line
from server.engines.checkpoint.json_files import listed, refuse_dangling, refuse_stand_in
from server.errors import ModelLoadError

_log = logging.getLogger(__name__)
_FAST = "tokenizer.json"
_OLDER = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tiktoken.model")
# What else transformers reads of a tokenizer, where it is there.
_BESIDE = (
    "merges.txt", "spm.model", "sentencepiece.model", "spm_char.model", "bpe.codes", "byte_maps.json", "emoji.json",
    "tekken.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "processor_config.json",
)  # fmt: skip
_NO_TEXT = ("image", "audio", "video", "vision", "boi", "eoi", "boa", "eoa")
_TEMPLATES = "additional_chat_templates"


def load_tokenizer(folder: Path, config: Any) -> PreTrainedTokenizerBase:
    """A fast one, for the folder's configuration. Raises ModelLoadError when there is none."""
    _refuse_stand_ins(folder)
    present = [name for name in (_FAST, *_OLDER) if (folder / name).is_file()]
    if not present:
        raise ModelLoadError(
            f"model: {folder} has no tokenizer. Copy {_FAST} and tokenizer_config.json from the model."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:
        raise ModelLoadError(f"model: {folder}: its tokenizer cannot be read. {_reason(present, error)}") from error
    if not tokenizer.is_fast or not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelLoadError(
            f"model: {folder} has a tokenizer only in Python ({type(tokenizer).__name__}), which cannot give text out "
            f"token by token. Convert it to {_FAST}."
        )
    _warn_of_template(folder, tokenizer)
    return tokenizer


def _refuse_stand_ins(folder: Path) -> None:
    """transformers would read a pointer as if it were the text, and a link to nowhere as nothing."""
    refuse_dangling(folder / _TEMPLATES)
    for path in (
        *(folder / name for name in (_FAST, *_OLDER, *_BESIDE)),
        *sorted(folder.glob(f"{_TEMPLATES}/*.jinja")),
    ):
        refuse_stand_in(path)


def _reason(present: list[str], error: Exception) -> str:
    has_fast = _FAST in present
    if not has_fast and not importlib.util.find_spec("sentencepiece") and any(n.endswith(".model") for n in present):
        return f"{listed(present)} without {_FAST} needs `pip install sentencepiece`, or a {_FAST} beside it."
    return one_line(error) if has_fast else f"There is no {_FAST}, and {listed(present)} did not do: {one_line(error)}"


def _warn_of_template(folder: Path, tokenizer: Any) -> None:
    """A template that is no Jinja fails each chat request; completions do without."""
    if not tokenizer.chat_template:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        _log.warning("Chat will be refused: the template of %s is not valid Jinja (%s)", folder, one_line(error))
    except Exception as error:
        _log.debug("The chat template of %s refuses a single message: %s", folder, error)


def warn_of_tokens_beyond(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    """Tokens that the model has no embedding for: a prompt with one is refused when it comes."""
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= vocab_size)
    if beyond:
        _log.warning(
            "%s: its tokenizer has %d tokens beyond the %d that the model has (%s); prompts with them are refused",
            folder, len(beyond), vocab_size, listed([repr(token) for _, token in beyond]),
        )  # fmt: skip


def eos_token_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """All that end a text, by the generation config and by the tokenizer."""
    eos = getattr(generation_config, "eos_token_id", None)
    listed_eos = eos if isinstance(eos, list) else [eos]
    return frozenset(int(token) for token in [*listed_eos, tokenizer.eos_token_id] if token is not None)


def placeholder_ids(config: Any) -> frozenset[int]:
    """Tokens that stand for what is no text, by the names that transformers gives them in a configuration."""
    if config.get_text_config() is config:
        return frozenset()
    return frozenset(
        value
        for name, value in vars(config).items()
        if type(value) is int and name.endswith(("_token_id", "_token_index")) and name.startswith(_NO_TEXT)
    )
