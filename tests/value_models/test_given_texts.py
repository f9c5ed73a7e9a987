"""Pairs and texts that users bring: which forms are read, and what is refused, with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from value_models.errors import TextsFileError
from value_models.given_texts import GivenText, read_pairs, read_texts, validation_prompts


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIRS: list[dict[str, Any]] = [{"prompt": f"Q{i}:", "chosen": " yes", "rejected": " no"} for i in range(8)]
TEXTS: list[dict[str, Any]] = [{"text": f"text {i}", "score": i} for i in range(8)]


def write(path: Path, *records: object, others: list[dict[str, Any]]) -> Path:
    """A file of `others`, with these records in the place of the first ones; a string stands as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    lines += [json.dumps(record) for record in others[len(lines) :]]
    path.write_text("\n".join(lines) + "\n")
    return path


ASKED = (user("Hi?"),)


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", " blue.", " green."),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is", " blue.", " black."),
        ({"chosen": "A: x\n\nB: go", "rejected": "A: x\n\nB: gone"}, "A: x\n\nB:", " go", " gone"),
        ({"chosen": "One.", "rejected": "Other."}, "", "One.", "Other."),
        ({"prompt": [user("Hi?")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, ASKED, "a", "b"),
        ({"messages": [user("Hi?")], "chosen": "a", "rejected": "b"}, ASKED, "a", "b"),
        ({"prompt": [user("Hi?")], "chosen": "a", "rejected": "b"}, ASKED, "a", "b"),
        ({"chosen": [user("Hi?"), assistant("a")], "rejected": [user("Hi?"), assistant("b")]}, ASKED, "a", "b"),
        ({"prompt": "Hi?", "chosen": [assistant("a")], "rejected": [assistant("b")]}, ASKED, "a", "b"),
        ({"prompt": "Hi?", "chosen": [*ASKED, assistant("a")], "rejected": [*ASKED, assistant("b")]}, ASKED, "a", "b"),
    ],
)
def test_each_form_of_a_pair_gives_the_same_prompt_and_two_responses(
    record: dict[str, Any], prompt: object, chosen: str, rejected: str, tmp_path: Path
) -> None:
    first, second, *_ = read_pairs(write(tmp_path / "p.jsonl", record, others=PAIRS)).texts
    assert first == GivenText(1, first.prompt, chosen, 1.0, 0)
    assert second == GivenText(1, first.prompt, rejected, -1.0, 1)
    assert first.prompt == prompt


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("{torn", "no JSON object (Expecting property name enclosed in double quotes at column 2)"),
        ("[1]", "a JSON object is needed"),
        ('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "the field 'prompt' occurs twice"),
        ('{"chosen": "\\ud800", "rejected": "d"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "chosen is missing; it has prompt, choosen, rejected"),
        ({**PAIRS[0], "id": 3}, "unknown fields id; known are prompt, messages, chosen, rejected, and --ignore-fields"),
        ({**PAIRS[0], "chosen": ""}, "chosen: is empty"),
        ({**PAIRS[0], "chosen": " \n"}, "chosen: is empty"),
        ({**PAIRS[0], "rejected": None}, "chosen and rejected must both be texts, or both lists of messages"),
        ({**PAIRS[0], "chosen": 1, "rejected": 2}, "chosen: must be a text"),
        ({**PAIRS[0], "chosen": " no"}, "chosen and rejected are equal"),
        ({**PAIRS[0], "messages": [user("a")]}, "prompt and messages both hold the prompt"),
        ({**PAIRS[0], "prompt": []}, "prompt: there is no message before the answer"),
        ({**PAIRS[0], "prompt": [user("a"), assistant("b")]}, "an answer follows a message of the assistant"),
        ({**PAIRS[0], "prompt": [{"role": "robot", "content": "a"}]}, "prompt.0.role: must be one of system, "),
        ({**PAIRS[0], "prompt": [{"content": "a"}]}, "prompt.0: a message has the fields role and content"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "chosen: the last message must be of the role assistant"),
        (
            {"chosen": [user("a"), assistant("c")], "rejected": [user("b"), assistant("d")]},
            "chosen and rejected differ before their last message",
        ),
        (
            {"prompt": "x", "chosen": [user("a"), assistant("c")], "rejected": [user("a"), assistant("d")]},
            "the conversations do not begin with the prompt beside them",
        ),
        (PAIRS[1], "the same two responses as in line 1"),
        ({**PAIRS[1], "chosen": " no", "rejected": " yes"}, "the same two responses as in line 1"),
    ],
)
def test_a_pair_that_is_wrong_is_refused_with_its_line(record: object, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", PAIRS[1], record, others=PAIRS)
    with pytest.raises(TextsFileError) as raised:
        read_pairs(path)
    assert str(raised.value).startswith(f"{path}, line 2: ")
    assert why in str(raised.value)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ('{"text": "a", "score": NaN}', "no JSON object (NaN is not a finite number)"),
        ('{"text": "a", "score": -Infinity}', "no JSON object (-Infinity is not a finite number)"),
        ('{"text": "a", "score": 1e999}', "no JSON object (score is not a finite number)"),
        ('{"text": "a", "score": 1' + "0" * 400 + "}", "score: must be a finite number"),
        ({"text": "a", "score": 1e300}, "score: must be from -1e+12 to 1e+12"),
        ({"text": "a", "score": -(10**13)}, "score: must be from -1e+12 to 1e+12"),
        ({"text": "a", "score": True}, "score: must be a finite number; labels go into label"),
        ({"text": "a", "score": "1"}, "score: must be a finite number"),
        ({"text": "a", "label": 1}, "score is missing"),
        ({"text": "a", "label": 1, "score": 1}, "label and score both say"),
        ({"text": "a", "response": "b", "score": 1}, "text and response both hold the text"),
        ({"text": "a", "prompt": "b", "score": 1}, "text stands for itself"),
        ({"response": "a", "score": 1}, "prompt or messages is missing"),
        ({"prompt": "a", "score": 1}, "text, response or messages is missing"),
        ({"messages": [user("a")], "score": 1}, "messages: the last message must be of the role assistant"),
        ({"text": "text 1", "score": 1}, "the same text as in line 1"),
    ],
)
def test_a_text_that_is_wrong_is_refused_with_its_line(record: object, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", TEXTS[1], record, others=TEXTS)
    with pytest.raises(TextsFileError) as raised:
        read_texts(path)
    # A file whose lines hold labels and scores is refused at the line that lacks what the others have.
    assert why in str(raised.value) or "label is missing" in str(raised.value)
    assert str(raised.value).startswith(f"{path}, line ")


@pytest.mark.parametrize(
    ("labels", "good", "scores"),
    [
        ([True, False], None, [1.0, 0.0]),
        ([3, 5], None, [0.0, 1.0]),
        (["kind", "rude"], "rude", [0.0, 1.0]),
        ([True, False], "false", [0.0, 1.0]),
    ],
)
def test_two_labels_are_the_scores_one_and_zero(
    labels: list[Any], good: str | None, scores: list[float], tmp_path: Path
) -> None:
    records = [{"prompt": "p", "completion": f"c{i}", "label": labels[i % 2]} for i in range(4)]
    records += [{**record, "prompt": f"q{i}"} for record in records for i in range(8)]
    texts = read_texts(write(tmp_path / "t.jsonl", others=records), good_label=good).texts
    assert [text.score for text in texts[:2]] == scores


@pytest.mark.parametrize(
    ("labels", "good", "why"),
    [
        (["a", "b"], None, "the labels are 'a' and 'b'; say which one is wanted with --good-label"),
        (["a", "b"], "c", "no text has the label 'c' of --good-label; the labels are 'a' and 'b'"),
        ([1, 2, 3], None, "label: 3 is a third one"),
        ([True, 1], None, "label: is of another kind than in line 1"),
        ([True, 0.5], None, "label: must be true or false"),
        ([True], None, "all texts have the same score"),
    ],
)
def test_labels_that_do_not_tell_better_from_worse_are_refused(
    labels: list[Any], good: str | None, why: str, tmp_path: Path
) -> None:
    records = [{"text": f"t{i}", "label": labels[i % len(labels)]} for i in range(9)]
    with pytest.raises(TextsFileError) as raised:
        read_texts(write(tmp_path / "t.jsonl", others=records), good_label=good)
    assert why in str(raised.value)


def test_a_byte_order_mark_line_ends_of_windows_and_empty_lines_change_nothing(tmp_path: Path) -> None:
    plain = write(tmp_path / "p.jsonl", others=PAIRS)
    windows = tmp_path / "w.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert read_pairs(windows).texts == read_pairs(plain).texts


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n\n", "is empty"),
        (b"\xff\xfe{", "is not UTF-8"),
        (json.dumps(PAIRS[0]).encode(), ": 1 pairs of 1 different prompts; at least 8 are needed"),
    ],
)
def test_a_file_without_enough_is_refused(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(TextsFileError, match=why):
        read_pairs(path)
    with pytest.raises(TextsFileError, match="cannot be read"):
        read_pairs(tmp_path / "nowhere.jsonl")


def test_named_fields_are_left_out_and_plain_prompts_may_be_a_users(tmp_path: Path) -> None:
    record = {"id": 3, "prompt": "Wie geht's? 你好", "chosen": "好", "rejected": "schlecht"}
    first = read_pairs(write(tmp_path / "p.jsonl", record, others=PAIRS), as_chat=True, ignore=["id"]).texts[0]
    assert first.prompt == (user("Wie geht's? 你好"),)
    with pytest.raises(TextsFileError, match="prompt is missing; a chat cannot be told from its answer"):
        read_pairs(write(tmp_path / "p.jsonl", {"chosen": "a b", "rejected": "a c"}, others=PAIRS), as_chat=True)


@pytest.mark.parametrize(
    ("record", "ignored"),
    [
        (PAIRS[0], "rejected"),
        (PAIRS[0], "prompt"),
        ({"messages": [user("a")], "chosen": "b", "rejected": "c"}, "messages"),
        (TEXTS[0], "score"),
        (TEXTS[0], "text"),
        ({"prompt": "a", "response": "b", "score": 1}, "prompt"),
    ],
)
def test_a_field_that_is_needed_is_not_left_out(record: dict[str, Any], ignored: str, tmp_path: Path) -> None:
    read, others = (read_pairs, PAIRS) if "chosen" in record else (read_texts, TEXTS)
    path = write(tmp_path / "p.jsonl", record, others=others)
    with pytest.raises(TextsFileError) as raised:
        read(path, ignore=["id", ignored])
    assert str(raised.value) == f"ignore_fields: {path}, line 1 needs {ignored}, which cannot be left out"


def test_a_field_that_says_the_same_twice_may_be_left_out(tmp_path: Path) -> None:
    records = [{**text, "label": i % 2} for i, text in enumerate(TEXTS)]
    read = read_texts(write(tmp_path / "t.jsonl", others=records), ignore=["label"])
    assert [text.score for text in read.texts] == list(range(8))
    whole = [
        {
            "prompt": f"Q{i}",
            "chosen": [user(f"Hi {i}?"), assistant("a")],
            "rejected": [user(f"Hi {i}?"), assistant("b")],
        }
        for i in range(8)
    ]
    pairs = read_pairs(write(tmp_path / "p.jsonl", others=whole), ignore=["prompt"])
    assert pairs.texts[0].prompt == (user("Hi 0?"),)


def test_scores_that_differ_among_held_out_prompts_alone_are_refused(tmp_path: Path) -> None:
    ids = {text.prompt_id: i for i, text in enumerate(read_texts(write(tmp_path / "t.jsonl", others=TEXTS)).texts)}
    held_out = {ids[prompt_id] for prompt_id in validation_prompts(ids)}
    records = [{**text, "score": 1 if i in held_out else 0} for i, text in enumerate(TEXTS)]
    with pytest.raises(TextsFileError, match="apart from the 2 prompts that are held out all texts have the same"):
        read_texts(write(tmp_path / "t.jsonl", others=records)).check_spread(is_centred=False)


def test_parquet_is_read_as_json_lines_are(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"prompt": [user(f"Q{i}")], "chosen": "a", "rejected": "b"} for i in range(8)]
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "p.parquet")
    lines = read_pairs(write(tmp_path / "p.jsonl", others=records))
    assert read_pairs(tmp_path / "p.parquet").texts == lines.texts
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(TextsFileError, match=r"torn\.parquet is no parquet file"):
        read_pairs(tmp_path / "torn.parquet")


def test_a_fifth_of_the_prompts_is_held_out_whatever_their_order() -> None:
    ids = [f"{i:02d}" for i in range(50)]
    assert validation_prompts(ids) == validation_prompts(reversed(ids)) == set(ids[:10])
    assert len(validation_prompts(ids[:8])) == 2
