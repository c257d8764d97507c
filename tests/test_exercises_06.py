"""The checks of lesson 06: right, wrong, missing and absurd answers; and its tables and 16-bit models."""

import pytest
import torch
from safetensors import safe_open

from helpers.models import attach_lora
from notebooks.lessons.lesson_06 import (
    check_adapter_size,
    check_merge,
    check_prompt,
    folder_table,
    plain_model,
    size_of,
    size_table,
)

RANK = 4  # of the tiny adapter; the question is about rank 2


@pytest.fixture
def adapter(job, tmp_path):
    attach_lora(job["model"], job["config"]).save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


@pytest.fixture
def megabytes(adapter):
    """Of the weights at the rank that they have; the file itself is a little larger."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys()) / 1e6  # noqa: SIM118


@pytest.mark.parametrize(
    ("factor", "beginning", "holds"),
    [
        (1 / 2, "Right", "proportion"),
        (1, "Not yet", "trained with"),
        (1 / 4, "Not yet", ""),
        (2, "Not yet", "shapes"),
        (0.5e6, "Not yet", "in bytes"),
        (-1, "Not yet", ""),
        (float("nan"), "Not yet", "number"),
        (float("inf"), "Not yet", "number"),
    ],
)
def test_adapter_size(factor, beginning, holds, adapter, megabytes, said):
    line = said(check_adapter_size, factor * megabytes, adapter, rank=RANK // 2)
    assert line.startswith(beginning) and holds in line


@pytest.mark.parametrize(
    ("answer", "beginning"), [(None, "Your turn"), ("5 MB", "Not yet"), (True, "Not yet"), ([1], "Not yet")]
)
def test_adapter_size_of_something_else(answer, beginning, adapter, said):
    assert said(check_adapter_size, answer, adapter, rank=2).startswith(beginning)


def in_place(weight, a, b, alpha, rank):
    weight += alpha / rank * b @ a
    return weight


@pytest.mark.parametrize(
    ("answer", "beginning", "holds"),
    [
        (None, "Your turn", ""),
        (lambda w, a, b, alpha, rank: w + alpha / rank * b @ a, "Right", ""),
        (lambda w, a, b, alpha, rank: torch.addmm(w, b, a, alpha=alpha / rank), "Right", ""),
        (lambda w, a, b, alpha, rank: w + b @ a, "Not yet", "lora_alpha / r"),
        (lambda w, a, b, alpha, rank: w + alpha * b @ a, "Not yet", "lora_alpha / r"),
        (lambda w, a, b, alpha, rank: w, "Not yet", "W itself"),
        (lambda w, a, b, alpha, rank: alpha / rank * b @ a, "Not yet", "Add it to W"),
        (lambda w, a, b, alpha, rank: w + alpha / rank * a @ b, "Not yet", "raises"),
        (lambda w, a, b, alpha, rank: w - alpha / rank * b @ a, "Not yet", "product"),
        (lambda w, a, b, alpha, rank: b @ a @ w.T, "Not yet", ""),
        (lambda w, a, b, alpha, rank: 7, "Not yet", "one number"),
        (lambda w, a, b, alpha, rank: None, "Not yet", "raises"),
        (lambda w: w, "Not yet", "TypeError"),
        (in_place, "Not yet", "changes the W"),
        (12, "Not yet", "function itself"),
    ],
)
def test_merge(answer, beginning, holds, said):
    line = said(check_merge, answer)
    assert line.startswith(beginning) and holds in line


def chatml(messages):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("answer", "beginning", "holds"),
    [
        (None, "Your turn", ""),
        (chatml, "Right", ""),
        (lambda messages: chatml(messages)[:-1], "Not yet", "there yours ends"),
        (lambda messages: chatml(messages) + " ", "Not yet", "goes on"),
        (lambda messages: chatml(messages).replace("\n", " "), "Not yet", "line breaks"),
        (lambda messages: chatml(messages[-1:]), "Not yet", "characters are right"),
        (lambda messages: "", "Not yet", "first 0"),
        (lambda messages: None, "Not yet", "must be a text"),
        (lambda messages: messages["role"], "Not yet", "TypeError"),
        ("text", "Not yet", "function itself"),
    ],
)
def test_prompt(answer, beginning, holds, job, said):
    line = said(check_prompt, answer, job["tokenizer"])
    assert line.startswith(beginning) and holds in line


def test_a_template_that_refuses_system_messages_is_still_a_template(job, said):
    tokenizer = job["tokenizer"]
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    assert said(check_prompt, chatml, tokenizer).startswith("Right")


def test_sizes_are_those_on_disk(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "small.txt").write_bytes(b"x" * 1000)
    (tmp_path / "inner" / "large.bin").write_bytes(b"x" * 4_000_000)
    assert size_of(tmp_path) == 4_001_000 and size_of(tmp_path / "small.txt") == 1000
    assert list(folder_table(tmp_path).index) == ["inner/large.bin", "small.txt"]
    table = size_table({"one": tmp_path / "inner", "all": tmp_path})
    assert list(table["MB"]) == [4.0, 4.0] and table.loc["all", "times the first"] == 1.0


def test_a_plain_model_is_not_quantized_and_leaves_no_memory_behind(job, tiny_model):
    with plain_model(tiny_model, job["plan"]) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training
        assert model.get_memory_footprint() > 0
    assert model.get_memory_footprint() == 0
