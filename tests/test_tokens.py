"""What is shown and checked is what TRL trains, and training stops where it would learn nothing."""

import copy

import pytest
from datasets import Dataset

from helpers.data.issues import DataError
from helpers.data.tokens import (
    MASKED,
    check_tokens,
    coverage,
    ensure_chat_template,
    lengths,
    load_tokenizer,
    show_tokens,
    tokenize,
)
from helpers.memory import GIB, estimate
from helpers.plots import length_chart
from helpers.registry import CATALOG


def chat(question, answer):
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


CHATS = Dataset.from_list(
    [chat("Why?", "Because of <b>tea</b>."), chat("Größe?", "5 € 🌿"), chat("And\nthen?", "Nothing.")]
)
TEXTS = Dataset.from_list([{"text": "A plain text."}, {"text": "Another one."}])


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def base_tokenizer(tokenizer):
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("examples", [CHATS, TEXTS], ids=["chats", "texts"])
def test_the_tokens_are_those_that_trl_trains(tiny_model, tokenizer, examples, tmp_path):
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        SFTConfig(str(tmp_path), max_length=None, report_to="none", use_cpu=True, bf16=False),
        train_dataset=examples,
        processing_class=tokenizer,
    )
    ours = tokenize(examples, load_tokenizer(str(tiny_model)))
    assert [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset] == [
        tuple(tokens) for tokens in ours
    ]


def test_an_answer_and_its_end_are_trained_and_the_question_is_not(tokenizer):
    for example, tokens in zip(CHATS, tokenize(CHATS, tokenizer)):
        trained = [label for label in tokens.labels if label != MASKED]
        assert tokenizer.decode(trained) == example["completion"][0][
            "content"
        ] + "<|im_end|>\n" and tokens.trained == len(trained)
    assert all(
        tokens.labels == tokens.ids and tokens.ids[-1] == tokenizer.eos_token_id
        for tokens in tokenize(TEXTS, tokenizer)
    )


def test_a_good_data_set_passes_with_its_numbers(tokenizer):
    check = check_tokens(CHATS, tokenizer, max_length=70)
    assert check.ended == 3 and check.lengths == lengths(CHATS, tokenizer) and check.stop() is None
    assert "the end token is trained in 3 of 3" in str(check)
    assert check.cut_tokens == sum(max(0, length - 70) for length in check.lengths)
    assert coverage([1, 2, 3, 4], 3) == 0.75


def test_training_stops_if_every_label_is_masked(tokenizer):
    with pytest.raises(DataError, match="Every label is masked"):
        check_tokens(CHATS, tokenizer, max_length=20)
    mute = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    tokenizer.chat_template = mute
    with pytest.raises(DataError, match="Every label is masked"):
        check_tokens(CHATS, tokenizer)


def test_training_stops_if_one_example_has_no_trained_token(tokenizer):
    examples = Dataset.from_list([chat("Why?", "So."), chat("long " * 50, "never seen"), chat("What?", "That.")])
    with pytest.raises(DataError, match=r"example 2 has no trained token \(and 0 more\)"):
        check_tokens(examples, tokenizer, max_length=100)


def test_training_stops_if_the_end_token_is_never_trained(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(DataError, match="never learn to stop"):
        check_tokens(CHATS, tokenizer)


def test_training_stops_if_the_template_leaves_the_text_out(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% endfor %}{% if not add_generation_prompt %}<|im_end|>{% endif %}"
    )
    with pytest.raises(DataError, match="example 1 and example 2 differ as text but get identical tokens"):
        check_tokens(CHATS, tokenizer)


def test_another_end_of_turn_than_the_end_token_is_named(tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    check = check_tokens(CHATS, tokenizer)
    assert check.ended == 3 and "tokenizer.eos_token = '<|im_end|>'" in str(check)
    assert "padding uses the end token" in str(check)  # both are <|endoftext|> now


def test_padding_with_the_end_token_keeps_the_real_one_trained(tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokens = tokenize(CHATS, tokenizer)
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.eos_token_id)(
        [{"input_ids": t.ids, "labels": t.labels} for t in tokens]
    )
    for row, one in zip(batch["labels"].tolist(), tokens):
        assert (
            row[: len(one.ids)] == one.labels and tokenizer.eos_token_id in row and set(row[len(one.ids) :]) <= {MASKED}
        )


def test_a_base_model_gets_a_plain_template(base_tokenizer):
    with pytest.raises(DataError, match="ensure_chat_template"):
        tokenize(CHATS, base_tokenizer)
    assert ensure_chat_template(base_tokenizer) and not ensure_chat_template(base_tokenizer)
    check = check_tokens(CHATS, base_tokenizer)
    assert check.ended == 3
    shown = base_tokenizer.decode(tokenize(CHATS, base_tokenizer)[0].ids)
    assert shown == "### Question:\nWhy?\n\n### Answer:\nBecause of <b>tea</b>.<|im_end|>"
    endless = copy.deepcopy(base_tokenizer)
    endless.chat_template = endless.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        ensure_chat_template(endless)


def test_show_tokens_tells_trained_from_masked_without_color(tokenizer):
    view = show_tokens(CHATS[0], tokenizer)
    assert (
        "[[Because of <b>tea</b>.<|im_end|>\n]]" in str(view)
        and "[[" not in str(view).split("\n", 1)[1].split("assistant")[0]
    )
    page = view._repr_html_()
    assert "&lt;" in page and "<b>tea" not in page and "underline" not in page and "border-bottom:2px solid" in page
    assert "trained: counts in the loss" in page and "masked: read, not learned" in page and "special token" in page
    assert view.count("trained") == tokenize(CHATS, tokenizer)[0].trained and "cut" not in view.summary


def test_indented_code_stays_indented_in_exported_pages(tokenizer):
    """nbconvert drops ordinary spaces after a line break, so the page holds spaces that nothing drops."""
    from helpers.data.token_view import Piece, TokenView

    page = TokenView(
        [Piece(":\n    ", "trained", False), Piece("return", "trained", False), Piece(" 1", "trained", False)]
    )._repr_html_()
    assert "</span>\n\u00a0\u00a0\u00a0\u00a0</span>" in page and "> 1</span>" in page


def test_characters_of_several_tokens_are_shown_whole(tokenizer):
    view = show_tokens(CHATS[1], tokenizer)
    assert "5 € 🌿" in str(view) and "\ufffd" not in str(view) and "Größe" in str(view)
    assert sum(piece.tokens for piece in view.pieces) == len(tokenize(CHATS, tokenizer)[1].ids)


def test_what_would_be_cut_is_shown_as_cut(tokenizer):
    view = show_tokens(CHATS[0], tokenizer, max_length=40)
    assert (
        view.count("cut") == len(tokenize(CHATS, tokenizer)[0].ids) - 40
        and "{{" in str(view)
        and "line-through" in view._repr_html_()
    )
    assert "the loss counts every token" in show_tokens(TEXTS[0], tokenizer).summary


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
