"""What is shown and checked is what TRL trains, and training stops where it would learn nothing."""

import copy

import pytest
from datasets import Dataset

from helpers.data.check import load_examples
from helpers.data.issues import DataError
from helpers.data.tokens import (
    MASKED,
    TokenCheck,
    control_tokens,
    coverage,
    ensure_chat_template,
    lengths,
    load_tokenizer,
    tokenize,
    with_tokens,
)
from helpers.hardware import GIB
from helpers.memory import estimate
from helpers.plots import length_chart
from helpers.registry import CATALOG
from notebooks.lessons.lesson_03 import TokenSpan, TokenView, show_tokens


def chat(question, answer):
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


CHATS = Dataset.from_list(
    [chat("Why?", "Because of <b>tea</b>."), chat("Größe?", "5 € 🌿"), chat("And\nthen?", "Nothing.")]
)
TALK = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "Hi"), ("assistant", "Ho"))]
TALKS = Dataset.from_list([*CHATS, {"prompt": [*TALK, *CHATS[0]["prompt"]], "completion": CHATS[0]["completion"]}])
TEXTS = Dataset.from_list([{"text": "A plain text."}, {"text": "Another one."}])


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def base_tokenizer(tokenizer):
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("data", [TALKS, TEXTS, "customer_support.jsonl", "chat_tutor.jsonl"], ids=str)
@pytest.mark.parametrize("max_length", [None, 100])
def test_the_tokens_are_those_that_trl_would_make(root, tiny_model, tokenizer, data, max_length, tmp_path):
    """TRL's own preparation, of the examples as they are, and of those that already have their tokens."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    examples = load_examples(root / "data_samples" / data).select(range(40)) if isinstance(data, str) else data

    def prepared(examples):
        settings = SFTConfig(str(tmp_path), max_length=max_length, report_to="none", use_cpu=True, bf16=False)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainer = SFTTrainer(model, settings, train_dataset=examples, processing_class=tokenizer)
        batches = [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]
        return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset], batches

    theirs, ours = prepared(examples), prepared(with_tokens(examples, tokenizer, max_length))
    assert theirs == ours and len(theirs[0]) > 1
    cut = [(tokens.ids[:max_length], tokens.labels[:max_length]) for tokens in tokenize(examples, tokenizer)]
    assert theirs[0] == [row for row in cut if set(row[1]) != {MASKED}]


def checked(examples, tokenizer, max_length=None):
    check = TokenCheck(tokenizer, max_length)
    for number, (example, tokens) in enumerate(zip(examples, tokenize(examples, tokenizer)), start=1):
        check.lengths.append(len(tokens.ids))
        check.add(example, tokens, f"example {number}")
    return check


def test_an_answer_and_its_end_are_trained_and_the_question_is_not(tokenizer):
    for example, tokens in zip(CHATS, tokenize(CHATS, tokenizer)):
        trained = [label for label in tokens.labels if label != MASKED]
        assert tokenizer.decode(trained) == example["completion"][0]["content"] + "<|im_end|>\n"
        assert tokens.trained == len(trained)
    for tokens in tokenize(TEXTS, tokenizer):
        assert tokens.labels == tokens.ids and tokens.ids[-1] == tokenizer.eos_token_id


def test_a_good_data_set_passes_with_its_numbers(tokenizer):
    check = checked(CHATS, tokenizer, max_length=70)
    assert check.ended == 3 and check.lengths == lengths(CHATS, tokenizer) and not check.stop()
    too_many = sum(max(0, length - 70) for length in check.lengths)
    assert "the end token is trained in 3 of 3" in str(check)
    assert (f"{too_many:,} tokens too many" in str(check)) == (too_many > 0)
    assert coverage([1, 2, 3, 4], 3) == 0.75


FOR_ALL = "{{% for m in messages %}}{}{{% endfor %}}"


@pytest.mark.parametrize(
    ("template", "max_length", "words"),
    [
        (None, 20, "Every label is masked"),
        (
            FOR_ALL.format("{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% endif %}"),
            None,
            "Every label is masked",
        ),
        (FOR_ALL.format("{{ m.role }}: {{ m.content }}\n"), None, "never learn to stop"),
        (
            FOR_ALL.format("{{ m.role }}<|im_end|>"),
            None,
            "example 1 and example 2 differ as text but get identical tokens",
        ),
    ],
    ids=["all cut", "template without answers", "no end", "template without text"],
)
def test_training_stops_where_nothing_would_be_learned(tokenizer, template, max_length, words):
    tokenizer.chat_template = template or tokenizer.chat_template
    assert words in checked(CHATS, tokenizer, max_length).stop()


def test_a_template_that_writes_an_answered_question_differently_is_said(tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.warns(UserWarning, match="differently once it is answered"):
        tokens = tokenize(CHATS, tokenizer)[0]
    assert tokenizer.decode(tokens.ids[-tokens.trained :]).startswith("Because")


def test_another_end_of_turn_than_the_end_token_is_named(tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    check = checked(CHATS, tokenizer)
    assert check.ended == 3 and "tokenizer.eos_token = '<|im_end|>'" in str(check)
    assert "padding uses the end token" in str(check)  # both are <|endoftext|> now


def test_padding_with_the_end_token_keeps_the_real_one_trained(tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokens, end = tokenize(CHATS, tokenizer), tokenizer.eos_token_id
    rows = [{"input_ids": one.ids, "labels": one.labels} for one in tokens]
    for labels, one in zip(DataCollatorForLanguageModeling(end)(rows)["labels"].tolist(), tokens):
        assert labels[: len(one.ids)] == one.labels and end in labels and set(labels[len(one.ids) :]) <= {MASKED}


def test_a_base_model_gets_a_plain_template(base_tokenizer):
    with pytest.raises(DataError, match="ensure_chat_template"):
        tokenize(CHATS, base_tokenizer)
    assert ensure_chat_template(base_tokenizer) and not ensure_chat_template(base_tokenizer)
    check = checked(CHATS, base_tokenizer)
    assert check.ended == 3
    shown = base_tokenizer.decode(tokenize(CHATS, base_tokenizer)[0].ids)
    assert shown == "### Question:\nWhy?\n\n### Answer:\nBecause of <b>tea</b>.<|im_end|>"
    endless = copy.deepcopy(base_tokenizer)
    endless.chat_template = endless.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        ensure_chat_template(endless)


def test_show_tokens_tells_trained_from_masked_without_color(tokenizer):
    view = show_tokens(CHATS[0], tokenizer)
    masked, trained = str(view).split("\n", 1)[1].split("assistant")
    assert "[[Because of <b>tea</b>.<|im_end|>\n]]" in trained and "[[" not in masked
    page = view._repr_html_()
    assert "&lt;" in page and "<b>tea" not in page and "underline" not in page and "border-bottom:2px solid" in page
    assert "trained: counts in the loss" in page and "masked: read, not learned" in page and "special token" in page
    assert view.count("trained") == tokenize(CHATS, tokenizer)[0].trained and "cut" not in view.summary


def test_indented_code_stays_indented_in_exported_pages(tokenizer):
    """nbconvert drops ordinary spaces after a line break, so the page holds spaces that nothing drops."""
    page = TokenView([TokenSpan(text, "trained", False) for text in (":\n    ", "return", " 1")])._repr_html_()
    assert "</span>\n\u00a0\u00a0\u00a0\u00a0</span>" in page and "> 1</span>" in page


def test_characters_of_several_tokens_are_shown_whole(tokenizer):
    view = show_tokens(CHATS[1], tokenizer)
    assert "5 € 🌿" in str(view) and "\ufffd" not in str(view) and "Größe" in str(view)
    assert sum(span.tokens for span in view.spans) == len(tokenize(CHATS, tokenizer)[1].ids)


def test_what_would_be_cut_is_shown_as_cut(tokenizer):
    view = show_tokens(CHATS[0], tokenizer, max_length=40)
    assert view.count("cut") == len(tokenize(CHATS, tokenizer)[0].ids) - 40
    assert "{{" in str(view) and "line-through" in view._repr_html_()
    assert "the loss counts every token" in show_tokens(TEXTS[0], tokenizer).summary


def test_control_tokens_are_the_special_ones_and_those_of_the_template(tokenizer):
    found = control_tokens(tokenizer).search("a <think> <s> </s> <|im_end|>")
    assert found[0] == "<|im_end|>" and not control_tokens(tokenizer).search("a <|role|> <think>")
    tokenizer.add_tokens(["<|role|>", "<think>"])
    assert not control_tokens(tokenizer).search("a <|role|> <think>")
    tokenizer.chat_template += "{# <|role|> <think> #}"
    assert control_tokens(tokenizer).search("a <|role|> <think>")[0] == "<|role|>"
    with pytest.raises(DataError, match="no example"):
        with_tokens(CHATS.select([]), tokenizer)


def test_an_unknown_model_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="No tokenizer for"):
        load_tokenizer(str(tmp_path))


def test_the_length_chart_says_what_is_covered_and_what_more_would_cost():
    shape = CATALOG["Qwen2.5-1.5B-Instruct"].shape
    memory = {length: estimate(shape, 1, length).total_bytes / GIB for length in (512, 1024)}
    assert memory[1024] > memory[512] > 1
    figure = length_chart([100] * 97 + [900] * 3, 512, memory)
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "max_length 512 covers 97 % of your examples" in said and any("covers 100 %" in text for text in said)
    assert len(length_chart([5], 512).axes) == 1
