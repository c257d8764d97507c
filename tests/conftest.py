"""Shared fixtures: a tiny random Llama with a byte tokenizer, so that most tests need no download and take seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tests  # noqa: F401  # now: IPython 7, which Colab has, puts a folder with a package of this name onto the path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on a CPU too, where a rehearsal asks for them
# Several processes with several threads each would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

ROOT = Path(__file__).parent.parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with grouped-query attention and random weights; one token per byte, like a real checkpoint otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    folder = tmp_path_factory.mktemp("tiny-llama")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    bytes_tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_tokenizer.decoder = decoders.ByteLevel()
    bytes_tokenizer.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    set_seed(0)
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(vocabulary),
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        initializer_range=0.1,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture
def alpaca_rows() -> list[dict[str, str]]:
    return [{"instruction": f"What is {n} plus {n}?", "input": "", "output": f"The sum is {2 * n}."} for n in range(24)]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Print a measured figure even if the test passes, so that it stands in CI's log."""

    def print_now(text: str) -> None:
        # What a process of xdist prints is not seen: pytest_runtest_logreport prints it.
        if "PYTEST_XDIST_WORKER" in os.environ:
            record_property("said", text)
            return
        with capsys.disabled():
            print(f"\n    {text}", end="", flush=True)

    return print_now


@pytest.fixture
def attacks() -> int:
    """How often to kill at each place: more often in `make attack`."""
    return 20 if os.environ.get("ATTACK") else 3


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Sayings(config))


class Sayings:
    """Prints what tests in other processes said, where the results of those processes come together."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" and "PYTEST_XDIST_WORKER" not in os.environ:
            for text in (text for name, text in report.user_properties if name == "said"):
                self.config.get_terminal_writer().write(f"\n    {text}", flush=True)


@pytest.fixture
def job(tiny_model: Path, alpaca_rows: list[dict[str, str]]) -> dict[str, Any]:
    """What `train` and `build_trainer` need, for seven steps on the tiny model on a CPU."""
    return make_job(tiny_model, alpaca_rows)


def make_job(tiny_model: Path, alpaca_rows: list[dict[str, str]], **settings: Any) -> dict[str, Any]:
    from datasets import Dataset

    from helpers.config import TrainConfig
    from helpers.data import split
    from helpers.data.convert import to_examples
    from helpers.hardware import GIB, Gpu
    from helpers.models import load_quantized
    from helpers.planner import make_plan

    usual = {
        "name": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "max_steps": 7,
        "learning_rate": 5e-3,
        "effective_batch_size": 4,
        "max_length": 128,
        "validation_share": 0.25,
        "num_evaluations": 4,
    }
    config = TrainConfig(model=str(tiny_model), **(usual | settings))
    plan = make_plan(config, Gpu("CPU", "cpu", 16 * GIB, 12 * GIB))
    model, tokenizer = load_quantized(config, plan)
    examples = Dataset.from_list([to_examples(row)[1][0] for row in alpaca_rows])
    training, validation = split(examples, config.validation_share, config.seed)
    return {
        "config": config,
        "plan": plan,
        "model": model,
        "tokenizer": tokenizer,
        "training": training,
        "validation": validation,
    }


@pytest.fixture
def said(capsys):
    """`said(check, answer, words, ...)`: the check prints one line, which begins with `words`, or has them in its hint."""

    def run(check, answer, words, *arguments):
        assert check(answer, *arguments) is None
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(words) or (line.startswith("Not yet") and words in line), line

    return run


@pytest.fixture(scope="module")
def browser():
    from tests.browser.lab import ARGUMENTS, find_browser

    try:
        from playwright.sync_api import sync_playwright

        path = find_browser()
        why = "no Chromium was found (Debian: apt-get install chromium; else: playwright install chromium)"
    except ImportError:
        path, why = None, "playwright is not installed (pip install -r requirements-dev.txt)"
    if path is None:
        required = os.environ.get("CI", "").lower() == "true"
        (pytest.fail if required else pytest.skip)(f"browser tests: {why}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()
