"""The checks of lesson 06: right, wrong, missing and absurd answers; and its tables and 16-bit models."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from jinja2.exceptions import TemplateError
from safetensors.torch import save_file

from notebooks.lessons import lesson_06 as lesson
from tests.exercises import answers


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of rank 4, in fp32: 40,000 bytes. The file itself is a little larger."""
    folder = tmp_path_factory.mktemp("adapter")
    shapes = {"layer.lora_A.weight": (4, 1000), "layer.lora_B.weight": (1500, 4)}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@answers(
    {
        lesson.check_adapter_size: [
            (0.01, "Right. Both matrices"),
            (0.0101, "Right"),
            (0.04, "trained with"),
            (10_000, "in bytes"),
            (0.005, "16-bit numbers"),
            (0.0025, "once, not twice"),
            (0.16, "shapes"),
        ]
    }
)
def test_the_size_of_an_adapter_at_rank_one(said, adapter, check, answer, words):
    said(check, answer, words, adapter, 1)


def in_place(weight, a, b, alpha, rank):
    weight += alpha / rank * b @ a
    return weight


def template(messages, default="<|im_start|>system\nBe nice.<|im_end|>\n"):
    """As SmolLM2's: with a system message of its own where there is none."""
    turns = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    return ("" if messages[0]["role"] == "system" else default) + turns + "<|im_start|>assistant\n"


def without_system(messages, **_):
    """As Gemma's."""
    if messages[0]["role"] == "system":
        raise TemplateError("no system")
    return template(messages, "")


def tokenizer(write):
    return SimpleNamespace(apply_chat_template=lambda messages, tokenize, add_generation_prompt: write(messages))


@answers(
    {
        lesson.check_merge: [
            (lambda w, a, b, alpha, rank: w + alpha / rank * b @ a, "Right"),
            (lambda w, a, b, alpha, rank: torch.addmm(w, b, a, alpha=alpha / rank), "Right"),
            (lambda w, a, b, alpha, rank: w + b @ a, "the factor before it"),
            (lambda w, a, b, alpha, rank: w + alpha * b @ a, "the factor before it"),
            (lambda w, a, b, alpha, rank: w + alpha // rank * b @ a, "the factor before it"),
            (lambda w, a, b, alpha, rank: w, "W itself"),
            (lambda w, a, b, alpha, rank: alpha / rank * b @ a, "Add it to W"),
            (lambda w, a, b, alpha, rank: w + alpha / rank * a @ b, "raises"),
            (lambda w, a, b, alpha, rank: w - alpha / rank * b @ a, "product"),
            (lambda w, a, b, alpha, rank: b @ a @ w.T, "shape"),
            (lambda w, a, b, alpha, rank: 7, "one number"),
            (lambda w, a, b, alpha, rank: None, "returns None"),
            (lambda w: w, "TypeError"),
            (in_place, "changes the W"),
        ],
        partial(lesson.check_prompt, tokenizer=tokenizer(template)): [
            (template, "Right"),
            (partial(template, default=""), "the first 12 of 199 characters are right, up to ...'<|im_start|>'. Look"),
            (lambda messages: template(messages)[:-1], "white space"),
            (lambda messages: template(messages)[:-2], "there yours ends"),
            (lambda messages: template(messages) + "Hello", "goes on"),
            (lambda messages: template(messages).replace("\n", " "), "line breaks"),
            (lambda messages: template(messages[-1:]), "characters are right"),
            (lambda messages: "", "first 0"),
            (lambda messages: None, "returns None"),
            (lambda messages: messages["role"], "TypeError"),
        ],
        partial(lesson.check_prompt, tokenizer=tokenizer(without_system)): [
            (partial(template, default=""), "Right"),
            (template, "up to ...'<|im_start|>'. Look"),
            (lambda messages: template(messages, "").replace("assistant", "model"), "Look at what comes next"),
            (lambda messages: template(messages, "")[:-1], "white space"),
            (lambda messages: template(messages[:1], ""), "there yours ends"),
        ],
    }
)
def test_answers(said, check, answer, words):
    said(check, answer, words)


def test_sizes_are_those_on_disk(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "small.txt").write_bytes(b"x" * 1000)
    (tmp_path / "inner" / "large.bin").write_bytes(b"x" * 4_000_000)
    assert lesson.size_of(tmp_path) == 4_001_000 and lesson.size_of(tmp_path / "small.txt") == 1000
    assert list(lesson.folder_table(tmp_path).index) == ["inner/large.bin", "small.txt"]
    table = lesson.size_table({"one": tmp_path / "inner", "all": tmp_path})
    assert list(table["MB"]) == [4.0, 4.0] and table.loc["all", "times the first"] == 1.0


def test_a_plain_model_is_not_quantized_and_leaves_no_memory_behind(job, tiny_model):
    with lesson.plain_model(tiny_model, job["plan"]) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training
        assert model.get_memory_footprint() > 0
    assert model.get_memory_footprint() == 0
