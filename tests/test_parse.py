"""prompts/parse.py against A1111's published examples, and against a slow reading of every character by itself."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from minidiff.prompts.parse import LONGEST, at_step, check, parts, pieces

MARKS = ["(", ")", "[", "]", ":", ":1.3)", ":0.5)", "\\", "\\(", "\\)", "\\[", "BREAK", " ", "cat", "a", ",", "é", "\n"]
prompts = st.lists(st.sampled_from(MARKS) | st.text(max_size=5), max_size=16).map("".join)


def read(text: str) -> list[tuple[str, float]]:
    return [("BREAK" if piece.ends_chunk else piece.text, piece.weight) for piece in pieces(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # of modules/prompt_parser.py, in its documentation
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("\\(literal\\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        # and of its code
        ("", []),
        ("a) cat]", [("a) cat]", 1.0)]),
        ("a [cat", [("a ", 1.0), ("cat", 1 / 1.1)]),
        ("at 12:30, a:b", [("at 12:30, a:b", 1.0)]),
        ("cat:1.3) (dog:x)", [("cat:1.3) ", 1.0), ("dog:x", 1.1)]),
        ("(cat: -.5 )", [("cat", -0.5)]),
        ("(cat:1.2.3)", [("cat:1.2.3", 1.1)]),
        ("a\\b \\\\ \\(c\\)", [("ab \\ (c)", 1.0)]),
        ("a  BREAK\nb BREAKS BREAK", [("a", 1.0), ("BREAK", 1.0), ("b BREAKS", 1.0), ("BREAK", 1.0)]),
        ("(a BREAK b:1.2) c", [("a", 1.2), ("BREAK", 1.0), ("b", 1.2), (" c", 1.0)]),
    ],
)
def test_pieces(text: str, expected: list[tuple[str, float]]) -> None:
    assert read(text) == expected


# A prompt as its groups: a text, or (open, close, factor, inner groups)
words = st.text("ab, \\()[]é", min_size=1, max_size=4)
kinds = st.sampled_from([("(", ")", 1.1), ("[", "]", 1 / 1.1), ("(", ":0.5)", 0.5), ("(", ": 2 )", 2.0)])
groups = st.recursive(words, lambda inner: st.tuples(kinds, st.lists(inner, max_size=4)), max_leaves=12)


def written(group: object) -> str:
    if isinstance(group, str):
        return re.sub(r"([\\()\[\]])", r"\\\1", group)
    (opening, closing, _), inner = group
    return opening + "".join(map(written, inner)) + closing


def weighted(group: object, factor: float = 1.0) -> list[tuple[str, float]]:
    """Each character with its weight."""
    if isinstance(group, str):
        return [(character, factor) for character in group]
    (_, _, by), inner = group
    return [one for part in inner for one in weighted(part, by * factor)]


@given(st.lists(groups, max_size=4))
def test_weights_of_nested_groups_multiply(prompt: list[object]) -> None:
    found = [(character, weight) for text, weight in read("".join(map(written, prompt))) for character in text]
    expected = [one for group in prompt for one in weighted(group)]
    assert [character for character, _ in found] == [character for character, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@given(prompts)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        check(text)
    except ValueError as error:
        assert "in the prompt" in str(error)
        return
    found = pieces(text)
    assert all(a.ends_chunk or b.ends_chunk or a.weight != b.weight for a, b in pairwise(found))


@pytest.mark.parametrize("unit", ["(", "[", "(a", "[a", "a)", ":1.1)", "\\", "BREAK ", "((a:1.1)b", " ", "::", "(a:"])
def test_long_texts(unit: str) -> None:
    text = unit * (10_000 // len(unit))
    try:
        check(text)
    except ValueError as error:
        assert re.search(r"has the weight .*; expected -1000 to 1000", str(error))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (cat:1e9)", None),
        ("a (cat:1001)", "'cat' in the prompt has the weight 1001; expected -1000 to 1000"),
        ("(" * 100 + "cat", "has the weight 13780.6"),
        ("(a:" + "9" * 400 + ")", "has the weight inf"),
        ("a <lora:fox:0.8> fox", "'<lora:fox:0.8>' in the prompt names a file.*--lora fox.safetensors=0.8"),
        ("<lyco:fox>", "--lora fox.safetensors=1"),
        ("<hypernet:fox:1>", "Hypernetworks are not supported"),
        ("a" * (LONGEST + 1), "has 100,001 characters; expected at most 100,000"),
    ],
)
def test_refuses(text: str, message: str | None) -> None:
    if message is None:
        check(text)
        return
    with pytest.raises(ValueError, match=message):
        check(text)


# ---- steps, AND

SCHEDULES = [  # (text, [last step, what it reads until then]) of 10 steps: in A1111's documentation
    ("test", [(10, "test")]),
    ("a [b:3]", [(3, "a "), (10, "a b")]),
    ("a [b: 3]", [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", [(10, "a [unbalanced")]),
    ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
    ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    ("[a|(b:1.1)]", [(n, "a" if n % 2 else "(b:1.1)") for n in range(1, 11)]),
    ("[fe|]male", [(n, "female" if n % 2 else "male") for n in range(1, 11)]),
    ("[fe|||]male", [(n, "female" if n % 4 == 1 else "male") for n in range(1, 11)]),
    (
        "fantasy landscape with a [mountain:lake:0.2] and [an oak:a christmas tree:0.7][ in foreground::0.6]",
        [
            (2, "fantasy landscape with a mountain and an oak in foreground"),
            (6, "fantasy landscape with a lake and an oak in foreground"),
            (7, "fantasy landscape with a lake and an oak"),
            (10, "fantasy landscape with a lake and a christmas tree"),
        ],
    ),
    # more of ours
    ("[a:b:1.0] [c:d:1e9] [e:f:99] [g:h:-1]", [(10, "a [c:d:1e9] e h")]),
    ("\\[a:b:3\\] [a\\:b:c:3]", [(3, "\\[a:b:3\\] a\\:b"), (10, "\\[a:b:3\\] c")]),
    ("[a:b:c:3] [a:b] [|] a|b (c|d:1.2)", [(10, "[a:b:c:3] [a:b]  a|b (c|d:1.2)")]),
    ("[(a:b:3] [x|(y]", [(10, "[(a:b:3] [x|(y]")]),
    ("([a:b:3]", [(3, "(a"), (10, "(b")]),
]


@pytest.mark.parametrize(("text", "expected"), SCHEDULES)
def test_texts_of_steps(text: str, expected: list[tuple[int, str]]) -> None:
    reads = [at_step(text, step, 10) for step in range(1, 11)]
    assert reads == [next(part for last, part in expected if step <= last) for step in range(1, 11)]


@given(prompts)
def test_any_text_reads_something_in_every_step(text: str) -> None:
    assert at_step(text.replace("[", "("), 1, 2) == text.replace("[", "(")
    for step in (1, 2):
        read = at_step(text, step, 2)
        assert len(read) <= len(text)


@pytest.mark.parametrize("unit", ["[", "[a:", "[a|", "[a:b:3]", "[[a|b]:c:.5]", "(", "\\", "[a|b]]"])
def test_long_texts_of_steps(unit: str) -> None:
    text = unit * (10_000 // len(unit))
    at_step(text, 2, 5)
    at_step(text + ":2]" * 3000, 2, 5)


def test_and_joins_texts_with_weights() -> None:
    assert parts("at 12:30") == (("at 12:30", 1.0),)
    assert parts("a cat AND a dog") == (("a cat ", 1.0), (" a dog", 1.0))
    assert parts("a cat :1.2 AND (a dog:2) AND x: -.5\nAND") == (
        ("a cat", 1.2),
        (" (a dog:2) ", 1.0),
        (" x", -0.5),
        ("", 1.0),
    )
    assert parts("SAND ANDY and") == (("SAND ANDY and", 1.0),)
    check("AND " * 31)
    with pytest.raises(ValueError, match="AND joins 33 texts in the prompt; expected at most 32"):
        check("AND " * 32)
    with pytest.raises(ValueError, match="has the weight 2000"):
        check("a AND b:2000")
