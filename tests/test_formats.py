"""One record in, examples out: every common way to write down a question and an answer."""

import pytest

from helpers.data.convert import texts_of, to_examples, used_columns
from helpers.data.issues import ISSUE_TYPES, Issue

PAIR = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ASKED = ("instruction", "question", "prompt", "prompt", "query", "input", "Question", " Prompt ", "user", "problem")
ANSWERED = "output answer completion response reply output ANSWER Response assistant solution"


@pytest.mark.parametrize(("question", "answer"), zip(ASKED, ANSWERED.split()))
def test_question_and_answer_columns(question, answer):
    assert to_examples({"id": 7, question: "Why?", answer: "Because."}) == (
        "chat",
        [{"prompt": PAIR[:1], "completion": PAIR[1:]}],
    )


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PAIR},
        {"Messages": [message | {"name": None} for message in PAIR], "prompt": "ignored"},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"conversations": [{"role": None, "from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"messages": '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]'},
        {"messages": "[{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'Because.'}]"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, PAIR[1]]},
        {"messages": {"role": ["user", "assistant"], "content": ["Why?", "Because."]}},
        {"prompt": PAIR[:1], "completion": PAIR[1:]},
        {"instruction": "Why?", "output": "Because.", "messages": None, "text": "### Why? Because."},
    ],
)
def test_chats_in_every_dress(record):
    assert to_examples(record) == ("chat", [{"prompt": PAIR[:1], "completion": PAIR[1:]}])


def test_context_system_prompt_and_history_come_before_the_question():
    record = {"system": "Be kind.", "history": [["a", "b"]], "instruction": " Ask ", "input": "Context", "output": "x"}
    expected = turns(("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "Ask\n\nContext"))
    assert to_examples(record)[1][0]["prompt"] == expected
    dolly = {"instruction": "Ask", "context": "Context", "response": "Answer", "category": "qa"}
    assert to_examples(dolly)[1][0]["prompt"] == turns(("user", "Ask\n\nContext"))
    assert used_columns(dolly) == {"instruction", "context", "response"}


def test_a_conversation_gives_one_example_for_each_answer():
    said = ("1", "one", "2", "two", "3", "three")
    talk = turns(("system", "s"), *zip(("user", "assistant") * 3, said))
    form, examples = to_examples({"messages": talk})
    assert form == "chat" and [example["completion"][0]["content"] for example in examples] == ["one", "two", "three"]
    assert all(example["prompt"] + example["completion"] == talk[: 3 + 2 * n] for n, example in enumerate(examples))
    share_gpt = [
        {"from": "system", "value": "s"},
        *({"from": "human" if n % 2 else "gpt", "value": m["content"]} for n, m in enumerate(talk) if n),
    ]
    assert to_examples({"conversations": share_gpt}) == (form, examples)


def test_messages_of_weight_zero_are_read_but_not_trained():
    talk = turns(("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"))
    talk[1]["weight"] = 0
    assert [example["completion"][0]["content"] for example in to_examples({"messages": talk})[1]] == ["two"]


def test_plain_text_stays_exactly_as_it_is():
    assert to_examples({"text": "  a\n b "}) == ("text", [{"text": "  a\n b "}])
    assert texts_of({"text": "x"}) == ["x"]


@pytest.mark.parametrize(
    ("record", "code", "reason"),
    [
        ([1], "not an object", "a list"),
        (None, "not an object", "null"),
        ({}, "missing column", "no column at all"),
        ({"a": 1, "b": 2}, "missing column", "question and answer; found a, b"),
        ({"question": "a", "category": "b"}, "missing column", "for the answer; found question, category"),
        ({"instruction": "a", "output": None}, "empty", "'output' is empty"),
        ({"instruction": " \n", "output": "b"}, "empty", "'instruction' is empty"),
        ({"instruction": "a", "output": 42}, "wrong type", "'output' is a number"),
        ({"instruction": "a", "output": True}, "wrong type", "true or false"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "wrong type", "'input' is a list"),
        ({"instruction": "a", "history": [["only one"]], "output": "b"}, "wrong type", "pairs"),
        ({"instruction": "a", "history": 5, "output": "b"}, "wrong type", "pairs"),
        ({"messages": [PAIR[0], PAIR[1] | {"weight": "0"}]}, "wrong type", "the weight is '0'"),
        ({"messages": PAIR * 501}, "too large", "a thousand turns"),
        ({"messages": []}, "empty", "'messages' is empty"),
        ({"messages": "hello"}, "wrong type", "not a list"),
        ({"messages": ["hello"]}, "wrong type", "turn 1 is text"),
        ({"messages": [{"content": "a"}]}, "unknown role", "missing"),
        ({"messages": turns(("tool", "a"))}, "unknown role", "'tool'"),
        ({"messages": turns(("user", "a"), ("assistant", ""))}, "empty", "turn 2 is empty"),
        ({"messages": turns(("assistant", "a"))}, "role order", "turn 1 is assistant"),
        ({"messages": turns(("user", "a"), ("user", "b"))}, "role order", "turn 2 is user, expected assistant"),
        ({"messages": turns(("user", "a"), ("system", "b"))}, "role order", "turn 2 is system"),
        ({"messages": turns(("user", "a"))}, "ends with user", "no answer"),
        ({"messages": turns(("system", "a"))}, "no answer", "no assistant turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]}, "wrong type", "a list"),
        ({"text": 3}, "wrong type", "'text' is a number"),
        ({"messages": "[" * 5000}, "wrong type", "not a list"),
    ],
)
def test_what_cannot_be_used_gets_its_reason(record, code, reason):
    issue = to_examples(record)
    assert isinstance(issue, Issue) and issue.code == code and reason in issue.reason
    assert ISSUE_TYPES[code].rejects and ISSUE_TYPES[code].fix.endswith(".")
