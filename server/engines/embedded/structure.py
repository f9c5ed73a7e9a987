"""Texts that hold a JSON schema: which tokens may come next, row by row, by the library llguidance.

A schema is compiled once a request (`SchemaCompiler`), off the event loop; each choice then has a matcher of its own
(`SchemaMatcher`), which follows its tokens. The mask is the last thing that happens to logits before a token is drawn:
after control, bias and penalties, before the sampling filters. So log-probabilities, which are taken after control, and
control's budget do not know of it, and a row without a schema keeps its logits to the bit. A matcher belongs to a
sequence and not to its pages, so it stays where it is when the sequence is preempted and feeds its tokens again.
When a schema is complete, the end-of-sequence token is all that is left. Knows nothing of HTTP. Enter at
`SchemaCompiler.compile` and `constrained`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from server.calls.structure import CallStructure
from server.engines.embedded.call_grammar import call_grammar, opening
from server.engines.embedded.schemas import explained, prepared
from server.errors import GenerationError, InvalidRequestError, SchemaTooComplexError, UnsupportedFieldError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_log = logging.getLogger(__name__)
MAX_COPIED_CHARS = 2**20
_MAX_MESSAGE_CHARS = 200
_OF_LIMITS = re.compile(r"[Tt]oo many|limit|max is")
"""In errors of the library for texts that cost more than `_LIMITS` allow."""
# Between tokens of JSON: nothing, a space, or a new line with its indentation. Models can write whitespace without end.
_WHITESPACE = r"( |\n {0,32})?"
# What a schema may cost: some 0.2 s to compile, a few milliseconds a step (34 at most), and some 80 MB where strings
# are as long and strange as `prepared` allows. Measured with schemas made to be slow; what is beyond it is refused or
# ends its request.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 1_000_000,
    "step_max_items": 30_000,
    "max_items_in_row": 20_000,
    "max_lexer_states": 160_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}


class SchemaCompiler:
    """Compiles schemas for one tokenizer, from any thread. The first makes the tokenizer's tables: half a second."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size)
        self._tables: LLTokenizer | None = None
        self._making = threading.Lock()

    def compile(self, schema: str) -> CompiledSchema:
        """Raises UnsupportedFieldError where this server cannot, InvalidRequestError for what a schema has wrong."""
        tables = self._made_tables()
        schema = prepared(schema)
        # Text that a schema leaves no choice about would be cut into tokens by the tokenizer, which takes the text of
        # a special token (a literal "<eos>") for that token; no schema allows those.
        grammar = f'%llguidance {{"no_forcing": true}}\nstart: %json {_json_rule(schema)}'
        return self._checked(tables, grammar, schema, tables.tokenize_str('{"'), num_chars=len(schema))

    def compile_choices(self, choices: Sequence[str]) -> CompiledSchema:
        """Texts that are one of these, to the letter. Raises as `compile` does."""
        tables = self._made_tables()
        literals = " | ".join(json.dumps(choice) for choice in choices)
        grammar = f'%llguidance {{"no_forcing": true}}\nstart: {literals}'
        return self._checked(tables, grammar, "{}", [], num_chars=len(literals))

    def compile_calls(self, structure: CallStructure) -> CompiledSchema:
        """Texts whose calls of tools hold their schemas. Raises as `compile` does."""
        tables = self._made_tables()
        added = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
        grammar = call_grammar(
            structure,
            json_rule=lambda schema: _json_rule(prepared(schema)),
            special_token_ids={token.content: token_id for token_id, token in added.items() if token.special},
        )
        first = self._tokenizer(opening(structure), add_special_tokens=False)["input_ids"]
        return self._checked(tables, grammar, "{}", first, num_chars=len(grammar))

    def _checked(
        self, tables: LLTokenizer, grammar: str, schema: str, first: Sequence[int], *, num_chars: int
    ) -> CompiledSchema:
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(tables, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        # What goes wrong with the first tokens goes wrong here, where it can still be told.
        trial = matcher.deep_copy()
        for token_id in [None, *first]:
            if trial.is_error() or (token_id is not None and not trial.try_consume_tokens([token_id])):
                break
            trial.compute_bitmask()
        if trial.is_error():
            raise InvalidRequestError(explained(trial.get_error(), schema)[:_MAX_MESSAGE_CHARS])
        return CompiledSchema(matcher, self._vocab_size, num_chars)

    def _made_tables(self) -> LLTokenizer:
        with self._making:
            if self._tables is None:
                self._tables = self._make_tables()
            return self._tables

    def _make_tables(self) -> LLTokenizer:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise UnsupportedFieldError("this server needs `pip install 'recontrol[structured]'` for it") from error
        if not self._eos_token_ids:
            raise UnsupportedFieldError("this model has no token that ends a text")
        try:
            # A tokenizer may have tokens that the model has no embedding for; the mask leaves them out.
            num_tokens = max(self._vocab_size, len(self._tokenizer))
            return from_tokenizer(self._tokenizer, n_vocab=num_tokens, eos_token=self._eos_token_ids)
        except Exception as error:
            _log.warning("No structured output: llguidance refuses this model's tokenizer (%s)", error)
            raise UnsupportedFieldError("this model's tokenizer does not allow it") from error


def _json_rule(schema: str) -> str:
    """A prepared schema as it stands behind `%json`. Raises InvalidRequestError."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
        )
    except ValueError as error:
        raise InvalidRequestError(explained(str(error), schema)[:_MAX_MESSAGE_CHARS]) from error
    return json.dumps(json.loads(grammar)["grammars"][0]["json_schema"])


class CompiledSchema:
    """A schema, ready for as many texts as there are. Of each that runs there is a copy."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, num_chars: int = 0) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_chars = num_chars

    def check_copies(self, num_texts: int, *, param: str) -> None:
        """Raises InvalidRequestError for more texts than the schema may be copied for."""
        if num_texts * self._num_chars > MAX_COPIED_CHARS:
            raise InvalidRequestError(
                f"{param}: {num_texts} texts x {self._num_chars} characters of a schema or choices; a request may ask "
                f"for {MAX_COPIED_CHARS}",
                param=param,
            )

    def start(self) -> SchemaMatcher:
        """For a text of its own."""
        return SchemaMatcher(self._matcher.deep_copy(), self._vocab_size)


class SchemaMatcher:
    """Follows one text. Once it has failed, it stays so."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self.vocab_size = vocab_size
        self.num_tokens = 0
        """Of the text that it follows."""

    def allowed(self) -> np.ndarray:
        """Which tokens [V] may come next, as bool. Raises SchemaTooComplexError."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self.check()
        return np.unpackbits(allowed, count=self.vocab_size, bitorder="little").view(bool)

    def copy(self) -> SchemaMatcher:
        """For another way on from here."""
        other = SchemaMatcher(self._matcher.deep_copy(), self.vocab_size)
        other.num_tokens = self.num_tokens
        return other

    def check(self) -> None:
        """Raises SchemaTooComplexError where it has come to a limit, and GenerationError where it failed otherwise."""
        if not self._matcher.is_error():
            return
        if _OF_LIMITS.search(error := self._matcher.get_error()):
            raise SchemaTooComplexError(
                "the text has come where the schema allows too much at once; it needs fewer alternatives in one place, "
                "fewer properties that are not required, or shorter strings"
            )
        raise GenerationError(error)

    def advance(self, token_id: int) -> None:
        """Raises as `check` does, and GenerationError for a token that is not allowed."""
        if not self._matcher.consume_token(token_id):
            self.check()
            raise GenerationError("the schema does not allow this token")
        self.num_tokens += 1

    def go_back_to(self, num_tokens: int) -> None:
        """Forget all but so many tokens. Raises GenerationError."""
        count = self.num_tokens - num_tokens
        if count and not self._matcher.rollback(count):
            raise GenerationError(self._matcher.get_error())
        self.num_tokens = num_tokens


class TokenMask(Protocol):
    """What says which token may come next, and hears which one came."""

    def allowed(self) -> np.ndarray:
        """Which tokens [V], as bool. Raises SchemaTooComplexError, or GenerationError."""
        ...

    def check(self) -> None:
        """Raises the same where it has failed."""
        ...

    def advance(self, token_id: int) -> None: ...


def constrained(logits_BV: Tensor, matchers: Sequence[TokenMask | None]) -> Tensor:
    """Logits [B, V] with -inf for what a row's schema does not allow, all NaN in a row whose matcher fails.

    Where no row has a schema these are the ones passed in, which are never changed.
    """
    if not any(matchers):
        return logits_BV
    out_BV = logits_BV.clone()
    for logits_V, matcher in zip(out_BV, matchers, strict=True):
        if matcher is None:
            continue
        try:
            _keep(logits_V, matcher.allowed())
        except (SchemaTooComplexError, GenerationError):
            logits_V.fill_(math.nan)  # No token is drawn for it, and what ends it asks the matcher why.
    return out_BV


def _keep(logits_V: Tensor, is_allowed_V: np.ndarray) -> None:
    """In place; by way of the smaller of the two sets, which takes a fifth of a masked fill's time on a CPU."""
    size = len(is_allowed_V)
    is_few = np.count_nonzero(is_allowed_V) < size // 2
    chosen_M = torch.from_numpy(np.flatnonzero(is_allowed_V if is_few else ~is_allowed_V)).to(logits_V.device)
    if is_few:
        kept_M = logits_V[chosen_M]
        logits_V.fill_(-math.inf).index_copy_(0, chosen_M, kept_M)
    else:
        logits_V.index_fill_(0, chosen_M, -math.inf)
