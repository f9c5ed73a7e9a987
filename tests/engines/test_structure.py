"""Texts that hold a JSON schema: the mask alone, and with everything else that changes a row's tokens."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from server.control.params import Blocks
from server.engines.embedded import structure
from server.engines.embedded.core import EngineCore
from server.engines.embedded.schemas import FORMATS
from server.engines.embedded.structure import CompiledSchema, SchemaCompiler, SchemaMatcher, constrained
from server.errors import GenerationError, InvalidRequestError, SchemaTooComplexError, UnsupportedFieldError
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.conftest import EOS, VOCAB, Collected, byte_tokenizer, control, run, waiting_again
from tests.engines.test_scheduler import small_core

# Torch's operations and the native ones.
MODELS = [("llama", "float32"), ("wide_llama", "bfloat16")]
STEERED = control({"good": 1.0}, step_size=2.0)
PERSON = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["kind", "name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": ["integer", "null"]},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "tree": TREE,
    "any object": {"type": "object"},
    "optional": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"const": "x"}}},
    "few properties": {"minProperties": 1, "maxProperties": 3, "type": "object", "additionalProperties": {"const": 0}},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": [1, {"a": None}]}], "items": False},
    "lengths": {"type": "array", "minItems": 2, "maxItems": 3, "items": {"minLength": 1, "maxLength": 3}},
    "numbers": {"type": "array", "items": {"type": "number", "exclusiveMinimum": -1, "maximum": 2.5}, "maxItems": 4},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 120}]},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "text of special tokens": {"enum": ["<eos>", {"<bos>": "a<eos>"}]},
    "one of": {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "maximum": 9, "minimum": 0}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> SchemaCompiler:
    return SchemaCompiler(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids={EOS})


def ask(name: str, structure: object | None, *, seed: int = 1, **options: Any) -> GenerationRequest:
    sampling = {"max_tokens": 150, "seed": seed, **options.pop("sampling", {})}
    return GenerationRequest(name, (104, seed % 200), SamplingParams(**sampling), structure=structure, **options)


def anything(compiler: SchemaCompiler) -> CompiledSchema:
    """A grammar that allows every token at every place."""
    grammar = LLMatcher.grammar_from_lark(f"start: <[0-{VOCAB - 1}]>*")
    return CompiledSchema(LLMatcher(compiler._made_tables(), grammar, log_level=0), VOCAB)


def assert_holds(schema: dict[str, Any], result: Collected) -> None:
    assert result.finish_reasons == [FinishReason.STOP]
    jsonschema.Draft202012Validator(schema).validate(json.loads(result.text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_walk_through_the_mask_to_its_end_holds_the_schema(compiler: SchemaCompiler, name: str) -> None:
    compiled, tokenizer = compiler.compile(json.dumps(SCHEMAS[name])), byte_tokenizer()
    # Random letters would never close a string.
    closing = {EOS, *tokenizer('"}]')["input_ids"]}
    for seed in range(40):
        rng, matcher, tokens = random.Random(seed), compiled.start(), []
        while not tokens or tokens[-1] != EOS:
            allowed = np.flatnonzero(matcher.allowed()).tolist()
            ends = closing.intersection(allowed)
            tokens.append(rng.choice(sorted(ends) if ends and rng.random() < 0.4 else allowed))
            matcher.advance(tokens[-1])
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(tokenizer.decode(tokens[:-1])))


@pytest.mark.parametrize("model", MODELS, ids="-".join)
@pytest.mark.parametrize("steer", [None, STEERED], ids=["plain", "controlled"])
def test_every_text_that_ends_holds_its_schema_whatever_else_is_asked(
    make_core: Callable[..., EngineCore], compiler: SchemaCompiler, model: tuple[str, str], steer: Any
) -> None:
    core, compiled = make_core(model[0], dtype=model[1]), compiler.compile(json.dumps(PERSON))
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.5, "min_p": 0.2},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 10.0},
        # What the schema leaves is drawn however unlikely it is, and nothing else however likely.
        {"logit_bias": {EOS: -100.0, 5: 100.0, 7: 100.0}, "logprobs": 3},
    ]
    asked = [
        ask(f"r{i}", compiled, seed=i, sampling=settings[i % len(settings)], control=steer, num_choices=1 + i % 2)
        for i in range(18)
    ]
    results = run(core, asked)
    assert len(results) == 27
    for result in results.values():
        assert_holds(PERSON, result)
        assert result.token_ids[-1] == EOS


def test_a_grammar_that_allows_everything_changes_nothing(
    make_core: Callable[..., EngineCore], compiler: SchemaCompiler
) -> None:
    free = anything(compiler)
    for architecture, dtype in MODELS:
        core = make_core(architecture, dtype=dtype)
        for i, options in enumerate([{}, {"temperature": 0.0}, {"top_p": 0.7, "presence_penalty": 1.0}, {"top_k": 4}]):
            sampling = {"max_tokens": 20, "logprobs": 2, **options}
            for steer in (None, STEERED):
                bound = run(core, [ask("r", free, seed=i, sampling=sampling, control=steer, num_choices=2)])
                plain = run(core, [ask("r", None, seed=i, sampling=sampling, control=steer, num_choices=2)])
                assert [r.chunks for r in bound.values()] == [r.chunks for r in plain.values()]


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_neighbours_do_not_feel_a_schema_and_it_does_not_feel_them(
    make_core: Callable[..., EngineCore], compiler: SchemaCompiler, model: tuple[str, str]
) -> None:
    core = make_core(model[0], dtype=model[1])
    compiled = [None, compiler.compile(json.dumps(PERSON)), compiler.compile(json.dumps(TREE))]
    mixed = [
        ask(f"r{i}", compiled[i % 3], seed=i, sampling={"max_tokens": 40}, control=[None, STEERED][i % 2])
        for i in range(9)
    ]
    together = run(core, mixed)
    for other in (run(core, mixed[::-1]), run(core, mixed, steps_between=2), *(run(core, [one]) for one in mixed)):
        for key, result in other.items():
            assert result.token_ids == together[key].token_ids


def test_a_batch_without_schemas_keeps_its_very_logits(compiler: SchemaCompiler) -> None:
    logits_BV = torch.randn(3, VOCAB)
    assert constrained(logits_BV, [None, None, None]) is logits_BV
    before_BV = logits_BV.clone()
    out_BV = constrained(logits_BV, [None, compiler.compile("{}").start(), None])
    assert torch.equal(logits_BV, before_BV)
    assert torch.equal(out_BV[[0, 2]], before_BV[[0, 2]])
    is_kept_V = out_BV[1].isfinite()
    assert 0 < is_kept_V.sum() < VOCAB
    assert torch.equal(out_BV[1][is_kept_V], before_BV[1][is_kept_V])


def test_a_text_that_loses_its_pages_goes_on_where_its_schema_was(
    make_core: Callable[..., EngineCore], compiler: SchemaCompiler
) -> None:
    many = {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 3}
    compiled = compiler.compile(json.dumps(many))
    asked = [
        ask(f"r{i}", compiled, seed=i, sampling={"max_tokens": 250}, control=[None, STEERED][i % 2]) for i in range(5)
    ]
    core, roomy = small_core(make_core, 6), make_core()
    preempted: set[str] = set()

    def note(core: EngineCore) -> None:
        preempted.update(s.request.request_id for s in waiting_again(core) if s.token_ids)

    results, expected = run(core, asked, after_step=note), run(roomy, asked)
    assert preempted
    for key, result in results.items():
        assert result.token_ids == expected[key].token_ids
        assert_holds(many, result)


def test_log_probabilities_are_those_after_control_and_before_the_mask(
    core: EngineCore, compiler: SchemaCompiler
) -> None:
    compiled = compiler.compile(json.dumps(PERSON))
    sampling = {"max_tokens": 1, "logprobs": 5, "temperature": 0.0}
    bound = run(core, [ask("r", compiled, sampling=sampling, control=STEERED)])["r", 0].chunks[0]
    plain = run(core, [ask("r", None, sampling=sampling, control=STEERED)])["r", 0].chunks[0]
    assert bound.logprobs[0].top == plain.logprobs[0].top
    assert bound.edit == plain.edit
    assert bound.text == "{"
    assert bound.logprobs[0].logprob < plain.logprobs[0].logprob


def test_stop_strings_stop_tokens_and_max_tokens_still_end_a_text(core: EngineCore, compiler: SchemaCompiler) -> None:
    compiled, tokenizer = compiler.compile(json.dumps(PERSON)), byte_tokenizer()
    whole = run(core, [ask("r", compiled)])["r", 0]
    (colon,) = tokenizer(":")["input_ids"]
    for end, reason in (
        ({"stop": ('"kind"',)}, FinishReason.STOP),
        ({"stop_token_ids": (colon,)}, FinishReason.STOP),
        ({"max_tokens": 5}, FinishReason.LENGTH),
    ):
        cut = run(core, [ask("r", compiled, sampling=end)])["r", 0]
        assert cut.finish_reasons == [reason]
        assert whole.text.startswith(cut.text)
        assert len(cut.token_ids) < len(whole.token_ids)


@pytest.mark.parametrize("broken", ["allowed", "advance"])
def test_a_matcher_that_fails_ends_its_own_text_alone(
    core: EngineCore, compiler: SchemaCompiler, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    compiled = compiler.compile(json.dumps(PERSON))
    asked = [ask(f"r{i}", compiled if i % 2 else None, seed=i, sampling={"max_tokens": 30}) for i in range(6)]
    expected = run(core, asked)
    works, calls = getattr(SchemaMatcher, broken), iter(range(1000))

    def fail_once(self: SchemaMatcher, *args: Any) -> Any:
        if next(calls) == 10:
            raise GenerationError("a limit was reached")
        return works(self, *args)

    monkeypatch.setattr(SchemaMatcher, broken, fail_once)
    results = run(core, asked)
    failed = [key for key, result in results.items() if result.finish_reasons == [FinishReason.ERROR]]
    assert len(failed) == 1
    assert int(failed[0][0][1:]) % 2
    for key, result in results.items():
        assert key in failed or result.token_ids == expected[key].token_ids


LONG = {f"p{i}": {"type": "string", "minLength": i, "maxLength": 800 + i} for i in range(10)}
WIDE = {f"property {i}": {"type": "integer"} for i in range(450)}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 8192},
        {"type": "string", "maxLength": 8192},
        {"type": "object", "properties": LONG, "required": list(LONG), "additionalProperties": False},
        {"type": "object", "properties": WIDE},
        {"anyOf": [{"properties": {name: {}}, "type": "object"} for name in list(WIDE)[:20]]},
        {"items": {"anyOf": [{"type": "object", "properties": {key: {} for key in "abcdefg"}} for _ in range(60)]}},
        {"anyOf": [{"type": "string", "minLength": i, "maxLength": i + 1} for i in range(1, 126)]},
        {"anyOf": [{"type": "number", "minimum": 1.37 * i, "maximum": 2.91 * i + 1} for i in range(300)]},
        {"items": {"anyOf": [{"type": "string", "format": form} for form in sorted(FORMATS)]}},
    ],
    ids=[
        "a least length", "a greatest length", "many lengths", "many properties", "many objects", "alternative objects",
        "alternative lengths", "alternative ranges", "alternative formats",
    ],
)  # fmt: skip
def test_what_compiles_never_fails_on_its_way(compiler: SchemaCompiler, schema: dict[str, Any]) -> None:
    matcher, rng = compiler.compile(json.dumps(schema)).start(), random.Random(0)
    # Characters of every length, and each of JSON's escapes: what a string has the most states for.
    strange = byte_tokenizer()("é天😀\\nu00aF")["input_ids"]
    for _ in range(12_000):
        allowed = matcher.allowed()
        token_id = rng.choice([i for i in strange if allowed[i]] or np.flatnonzero(allowed).tolist())
        if token_id == EOS:
            break
        matcher.advance(token_id)


def test_a_text_that_comes_where_its_schema_allows_too_much_is_ended_as_the_callers_fault(
    core: EngineCore, compiler: SchemaCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lists of lists, each of eight kinds out of fifty.
    kinds = [
        [{"type": "array", "items": {"$ref": f"#/$defs/k{(7 * i + j) % 50}"}} for j in range(8)] for i in range(50)
    ]
    tangled = {"$defs": {f"k{i}": {"anyOf": kind} for i, kind in enumerate(kinds)}, "$ref": "#/$defs/k0"}
    monkeypatch.setitem(structure._LIMITS, "max_items_in_row", 500)
    bracket = byte_tokenizer()("[")["input_ids"][0]
    sampling = {"max_tokens": 30, "logit_bias": {bracket: 100.0}}
    plain = ask("plain", None, sampling={"max_tokens": 30})
    alone = run(core, [plain])
    both = run(core, [plain, ask("tangled", compiler.compile(json.dumps(tangled)), sampling=sampling)])
    assert isinstance(both["tangled", 0].chunks[-1].error, SchemaTooComplexError)
    assert both["plain", 0].token_ids == alone["plain", 0].token_ids


def is_a_text_of(compiled: CompiledSchema, text: str) -> bool:
    matcher = compiled.start()
    for token_id in byte_tokenizer()(text)["input_ids"]:
        if not matcher.allowed()[token_id]:
            return False
        matcher.advance(token_id)
    return bool(matcher.allowed()[EOS])


@pytest.mark.parametrize(
    ("schema", "texts", "others"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "0.1 0.5 0.001", "0 0.0 -0 -0.1 0.6"),
        ({"exclusiveMinimum": 1, "maximum": 1.5}, "1.01 1.5", "1 1.0 1.6 0.9"),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, "-0.1 -0.5", "0 -0 0.0 0.1 -0.6"),
        ({"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]}, "0.1", "0 0.0"),
        ({"exclusiveMaximum": 10}, "9.99 9 -3", "10 10.0 11"),
        ({"exclusiveMinimum": -100}, "-99.99 0", "-100 -100.0 -101"),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, "0 -5 123456789.5", "true"),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**64}, "0 -5 123456789012345678", "1.5"),
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10**30}, "1 123456789012345678", "0 -1"),
        ({"minimum": -1e300, "maximum": 1e300}, "0.5 -7", "null"),
    ],
)
def test_numbers_hold_their_bounds_to_the_last(
    compiler: SchemaCompiler, schema: dict[str, Any], texts: str, others: str
) -> None:
    compiled = compiler.compile(json.dumps({"type": "number", **schema}))
    assert [text for text in texts.split() if not is_a_text_of(compiled, text)] == []
    assert [text for text in others.split() if is_a_text_of(compiled, text)] == []


@pytest.mark.parametrize("form", ["path", "password", "int32", "no such"])
def test_an_unknown_format_is_an_annotation_and_so_is_uniqueness_that_is_not_asked_for(
    compiler: SchemaCompiler, form: str
) -> None:
    said = {
        "items": {"type": "string", "format": form},
        "uniqueItems": False,
        "prefixItems": [{"const": {"format": form}}],
    }
    matcher = compiler.compile(json.dumps(said)).start()
    for token_id in byte_tokenizer()(json.dumps([{"format": form}, "any text"]))["input_ids"]:
        matcher.advance(token_id)


def test_the_formats_that_hold_are_those_of_the_library(compiler: SchemaCompiler) -> None:
    for form in FORMATS:
        allowed = compiler.compile(json.dumps({"type": "string", "format": form})).start()
        allowed.advance(byte_tokenizer()('"')["input_ids"][0])
        assert not allowed.allowed()[byte_tokenizer()("!")["input_ids"][0]] or form == "email"


def test_a_token_that_is_not_allowed_is_an_error(compiler: SchemaCompiler) -> None:
    matcher = compiler.compile(json.dumps(PERSON)).start()
    with pytest.raises(GenerationError):
        matcher.advance(EOS)
    with pytest.raises(GenerationError):
        matcher.allowed()


ANY_OF_FIVE = [{"anyOf": [{"required": [f"{i}.{j}"], "type": "object"} for j in range(5)]} for i in range(10)]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "EOF"),
        ('{"type": "strin"}', "Invalid type"),
        ('{"not": {"type": "integer"}}', "^#/not: this keyword is not supported$"),
        ('{"properties": {"a/b": {"items": {"uniqueItems": true}}}}', "^#/properties/a~1b/items/uniqueItems: this key"),
        ('{"type": "object", "properties": []}', "^properties must be an object$"),
        ('{"type": "string", "minLength": 5, "maxLength": 3}', "^Unsatisfiable schema: minLength"),
        ('{"type": "string", "minLength": []}', "minLength"),
        ('{"items": {"maxLength": 9000}}', "^#/items/maxLength: minLength and maxLength may come to 8192"),
        ('{"minimum": 1e18}', "^#/minimum: numbers are held to -999999999999999999 to 999999999999999999$"),
        ('{"items": {"type": "integer", "exclusiveMaximum": -1e30}}', "^#/items/exclusiveMaximum: numbers are held to"),
        ('{"items": {"type": "number", "minimum": 1e-300}}', "^#/items/minimum: no text can be held to such a range"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"$ref": "#/$defs/nobody"}', "does not exist"),
        ('{"$ref": "http://127.0.0.1/x.json"}', "does not fetch"),
        ('{"$ref": "#"}', r"^#/\$ref: refers to itself"),
        ('{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "refers to itself"),
        ('{"allOf": [{"$ref": "#"}]}', "^#: the schema refers to itself"),
        (json.dumps({"allOf": ANY_OF_FIVE}), "too"),
        (json.dumps({"properties": {f"p{i}": {} for i in range(451)}}), "^#/properties: at most 450 properties"),
    ],
)
def test_a_schema_that_is_wrong_or_too_complex_is_refused_with_the_reason(
    compiler: SchemaCompiler, schema: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        compiler.compile(schema)
    assert len(caught.value.message) <= 200
    assert "\n" not in caught.value.message


def test_a_model_that_cannot_is_told_apart_from_a_schema_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    no_end = SchemaCompiler(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids=())
    foreign = SchemaCompiler(object(), vocab_size=VOCAB, eos_token_ids={EOS})
    too_small = SchemaCompiler(byte_tokenizer(), vocab_size=VOCAB - 10, eos_token_ids={EOS})
    for compiler, reason in ((no_end, "no token that ends"), (foreign, "tokenizer"), (too_small, "no token that ends")):
        with pytest.raises(UnsupportedFieldError, match=reason):
            compiler.compile("{}")
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(UnsupportedFieldError, match="structured"):
        SchemaCompiler(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids={EOS}).compile("{}")


@pytest.mark.parametrize("way", [{"best_of": 4}, {"search": {"type": "blocks", "candidates": 3, "block_tokens": 5}}])
def test_candidates_hold_a_schema_too_each_with_a_matcher_of_its_own(
    core: EngineCore, compiler: SchemaCompiler, way: dict[str, Any]
) -> None:
    compiled = compiler.compile(json.dumps(PERSON))
    steer = STEERED.model_copy(update={"search": Blocks(**way["search"])} if "search" in way else {})
    asked = [ask(f"r{seed}", compiled, seed=seed, control=steer, best_of=way.get("best_of")) for seed in range(6)]
    results = run(core, asked)
    texts = [result.text for result in results.values() if result.finish_reasons == [FinishReason.STOP]]
    assert len(texts) == len(asked)
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert core.status().kv_cache_usage == 0
