"""Lessons 00 to 07 on a CUDA card, as far as that can be known without one.

First by rules that read every cell (`card_rules`); each rule is shown to find what it is for. Then by running the lessons' own loops in
the formats of a card, fp16 and bf16, on a tiny model: what they print must still be true.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from helpers.compat import get_checkpointing
from helpers.config import TrainConfig
from helpers.data.convert import to_examples
from helpers.hardware import KNOWN_GPUS
from helpers.models import attach_lora, load_quantized
from helpers.planner import make_plan
from helpers.recipe import total_steps
from notebooks.lessons import scaffold
from notebooks.lessons.lesson_02 import short_examples
from tests.rehearsal.card_rules import complaints
from tools.course import ROOT, code_cells, lessons, read, solutions

NOTEBOOKS = lessons() + solutions()
DTYPES = ("float32", "float16", "bfloat16")
# How far gradients and losses may lie from fp32's, and "in parts" from "at once": a little above what was measured with the tiny model.
# (The bundled model, on four letters: bf16 5 % from fp32 and 1.8 % in parts, where the mean of means is 16 % off.)
GRADIENT = {"float32": 1e-5, "float16": 0.003, "bfloat16": 0.02}
IN_PARTS = {"float32": 1e-5, "float16": 0.001, "bfloat16": 0.005}
LOSS = {"float32": 1e-6, "float16": 0.001, "bfloat16": 0.02}


def sources(path: Path) -> list[str]:
    return [cell.source for cell in code_cells(read(path))]


# ------------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_cell_breaks_a_rule_of_the_card(path):
    assert complaints(sources(path)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "lessons").glob("*.py")), ids=lambda path: path.stem)
def test_what_the_lessons_import_keeps_the_rules_too(path):
    module = ast.parse(path.read_text(encoding="utf-8"))  # checks of exercises calculate with toys, on any machine
    module.body = [part for part in module.body if not getattr(part, "name", "").startswith("check_")]
    assert complaints([ast.unparse(module)]) == []


LOADED = (
    "import torch\nfrom torch.nn.functional import cross_entropy\nmodel, tokenizer = load_quantized(config, plan)\n"
)
BAD = [
    ("model(input_ids=torch.tensor([[1, 2]]))", "made on the CPU"),
    ("ids = torch.tensor([[1, 2]])\nlogits = model(ids).logits", "made on the CPU"),
    ("x = torch.randn(4, 8)\ny = x @ model.get_submodule('a').weight.T", "made on the CPU"),
    (
        "levels = torch.linspace(-1, 1, 16)\nw = model.lm_head.weight.float()\nprint((w - levels).abs().max())",
        "made on the CPU",
    ),
    (
        "def loss(labels):\n    logits = model(input_ids=torch.tensor([1]).to(model.device)).logits\n"
        "    return cross_entropy(logits.float(), torch.tensor(labels))",
        "made on the CPU",
    ),
    (
        "def error(a, b):\n    return (a - b).norm()\nprint(error(model.lm_head.weight, torch.zeros(4)))",
        "made on the CPU",
    ),
    (
        "lora = attach_lora(model, config)\nbatch = tokenizer.apply_chat_template(talk, return_tensors='pt')\nlora(batch)",
        "made on the CPU",
    ),
    ("with plain_model(folder, plan) as whole:\n    whole(torch.ones(1, 4).long())", "made on the CPU"),
    (
        "grads = torch.cat([w.grad.flatten() for w in model.parameters()])\nprint(grads - torch.zeros(3))",
        "made on the CPU",
    ),
    ("model.to('cuda')", "device by its name"),
    ("x = torch.zeros(3, device='cuda:0')", "device by its name"),
    ("x = torch.zeros(3).cuda()", "device by its name"),
    ("x = torch.randn(3, device=model.device, generator=torch.Generator().manual_seed(0))", "generator of the CPU"),
    ("import numpy as np\nnp.mean(model.lm_head.weight)", "cannot read a card's memory"),
    ("values = model.lm_head.weight.detach().numpy()", ".float().cpu()"),
    ("values = model.lm_head.weight.detach().cpu().numpy()", ".float().cpu()"),
    ("values = model.lm_head.weight.detach().float().flatten()\nvalues.numpy()", ".float().cpu()"),
    ("model(**batch, labels=labels).loss.backward()", "scaled loss"),
    ("scale = 2\nloss = model(**batch).loss\n(scale * loss).backward()", "scaled loss"),
    (
        "def gradient(rows):\n    with mixed_precision(lora) as scale:\n        loss = summed(rows)\n    loss.backward()",
        "scaled loss",
    ),
    ("import time\nbegan = time.perf_counter()\nmodel(**batch)\nprint(time.perf_counter() - began)", "a clock"),
    ("layer = model.get_submodule('a')\ndel model\nfree_memory()", "layer keeps"),
    (
        "layers = [(name, module) for name, module in model.named_modules()]\nkept = dict(layers)\ndel model, kept\nfree_memory()",
        "layers keeps",
    ),
    ("weight = model.lm_head.weight.detach()\ndel model\nfree_memory()", "weight keeps"),
    (
        "for name, layer in {n: m for n, m in model.named_modules()}.items():\n    matrix = layer.weight.data\ndel model, layer, name\nfree_memory()",
        "matrix keeps",
    ),
    (
        "weights = [w for w in model.parameters()]\noptimizer = torch.optim.AdamW(weights)\nrelease_last_model()",
        "optimizer keeps",
    ),
    (
        "optimizer = torch.optim.AdamW(model.parameters())\nvalues = [v for s in optimizer.state.values() for v in s.values()]\noptimizer = None\n"
        "release_last_model()",
        "values keeps",
    ),
]
GOOD = [
    "model(input_ids=torch.tensor([[1, 2]], device=model.device))",
    "ids = torch.tensor([[1, 2]])\nlogits = model(ids.to(model.device)).logits",
    "w = model.lm_head.weight.float()\nlevels = torch.linspace(-1, 1, 16, device=w.device)\nprint((w - levels).abs().max())",
    "w = model.lm_head.weight.float().cpu()\nprint(w - torch.zeros(4))",
    "bell = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))\nprint(bell - torch.zeros(8), len(bell), model)",
    "with mixed_precision(model) as scale:\n    loss = model(**batch).loss\n(scale * loss).backward()",
    "def accumulate(model, parts):\n    for part, target in parts:\n        (model(part) - target).sum().backward()",
    "import time\ntorch.cuda.synchronize()\nbegan = time.perf_counter()\nmodel(**batch)\ntorch.cuda.synchronize()\nprint(time.perf_counter() - began)",
    "while process.poll() is None:\n    time.sleep(0.2)",
    "layer = model.get_submodule('a')\nsize = layer.weight.float().norm()\ndel model, layer\nfree_memory()",
    "optimizer = torch.optim.AdamW(model.parameters())\noptimizer = torch.optim.AdamW([torch.zeros(1)])\nrelease_last_model()",
    "values = scaled.detach().float().cpu().flatten()\nvalues.numpy()",
]


@pytest.mark.parametrize(("code", "words"), BAD)
def test_each_rule_finds_what_it_is_for(code, words):
    found = complaints([LOADED, *code.split("\n\n")])
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize("code", GOOD)
def test_no_rule_finds_what_is_right(code):
    assert complaints([LOADED, code]) == []


def test_the_names_that_lesson_01_once_left_behind_are_found():
    cells = [
        source.replace("del model, layer, layers, matrix, weight", "del model, layer, layers, matrix")
        for source in sources(ROOT / "notebooks" / "01_load_quantized_model.ipynb")
    ]
    assert [words.split()[0] for words in complaints(cells)] == ["weight"]


# ------------------------------------------------------------------------------------------- the lessons' own cells


class Lesson:
    """Cells of a lesson, run one by one with names that a test gives."""

    def __init__(self, stem: str, **names: Any) -> None:
        self.cells = sources(ROOT / "notebooks" / f"{stem}.ipynb")
        self.names = names

    def run(self, *marks: str) -> str:
        """Runs the one cell that holds each mark; what they printed."""
        said = io.StringIO()
        for mark in marks:
            [cell] = [source for source in self.cells if mark in source]
            with contextlib.redirect_stdout(said):
                exec(compile(cell, mark, "exec"), self.names)
        return said.getvalue()

    def __getitem__(self, name: str) -> Any:
        return self.names[name]


@pytest.fixture(scope="module")
def rounded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights that both 16-bit formats hold exactly, as files from the Hub have them: in every format, the same codes."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("rounded") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    rounded = {
        name: (tensor.bfloat16().float() * (tensor.abs() > 1e-4)).contiguous() for name, tensor in weights.items()
    }
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def in_dtype(job, rounded_model, monkeypatch):
    """dtype -> what a lesson has after its first cells, with the tiny model loaded as on a card that calculates in it."""
    asked, threads = torch.is_autocast_enabled, torch.get_num_threads()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked("cpu"))  # PEFT asks for CUDA's state
    monkeypatch.setattr("helpers.plots.picture", lambda *_: None)
    torch.set_num_threads(1)  # so small a model gains nothing from more

    # answers of very different lengths, so that a mean of means is another gradient
    rows = [
        {"instruction": f"Say {n}.", "output": "Yes." if n % 2 else "No, not today, and not tomorrow either."}
        for n in range(8)
    ]
    letters = Dataset.from_list([to_examples(row)[1][0] for row in rows])

    def prepare(stem: str, dtype: str, **names: Any) -> Lesson:
        plan = replace(job["plan"], dtype=dtype, model=str(rounded_model))
        model, tokenizer = load_quantized(job["config"], plan)
        shared = {
            "config": job["config"],
            "plan": plan,
            "gpu": plan.gpu,
            "model": model,
            "tokenizer": tokenizer,
            "training": letters,
            "validation": letters,
            "Path": Path,
            "torch": torch,
        }
        return Lesson(stem, **shared | names)

    yield prepare
    torch.set_num_threads(threads)


def away(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far `one` is from `other`, as a share of `other`'s length."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def lesson_04(in_dtype, dtype: str) -> Lesson:
    lesson = in_dtype("04_train", dtype)
    lesson.names["lora"] = attach_lora(lesson["model"], lesson["config"]).train()
    lesson.run("def summed_loss", "def gradient", "four = ", "in_parts = ")
    return lesson


def test_lesson_04_gives_the_same_gradient_in_parts_in_every_format(in_dtype, say):
    exact = lesson_04(in_dtype, "float32")["at_once"]
    for dtype in DTYPES:
        found = lesson_04(in_dtype, dtype)
        off, parts = away(found["at_once"], exact), away(found["in_parts"], found["at_once"])
        say(
            f"lesson 04, {dtype}: {off:.5f} from fp32, in parts {parts:.7f}, mean of means {away(found['own_means'], found['at_once']):.3f}"
        )
        assert off <= GRADIENT[dtype] and parts <= IN_PARTS[dtype] < away(found["own_means"], found["at_once"])


def test_lesson_04_measures_both_modes_and_leaves_the_gradient_as_it_is(in_dtype):
    lesson = lesson_04(in_dtype, "float16")
    lesson.run("def measure", "two = four[:2]")
    assert get_checkpointing(lesson["lora"]) == "on" and all(
        cost.seconds > 0 for costs in lesson["tries"] for cost in costs.values()
    )
    recomputed = lesson["gradient"]([lesson["four"]], lambda rows: lesson["answer_tokens"])
    assert away(recomputed, lesson["at_once"]) <= IN_PARTS["float16"]


def test_lesson_06_reads_back_the_same_logits_in_every_format(in_dtype, tmp_path):
    for dtype in DTYPES:
        lesson = in_dtype("06_save_and_use", dtype)
        lora = attach_lora(lesson["model"], lesson["config"])
        with torch.no_grad():
            for name, weight in lora.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        lora.save_pretrained(tmp_path / dtype, save_embedding_layers=False)
        lesson.names["run"] = SimpleNamespace(model=lora, adapter=tmp_path / dtype)
        said = lesson.run("in_memory = run.model")
        assert printed(said, "of a logit, reloaded:") == 0 < printed(said, "without the adapter:")


def test_lesson_07_gives_the_gradient_of_one_process_in_every_format(in_dtype, say):
    found: dict[str, Lesson] = {}
    for dtype in DTYPES:
        lesson = in_dtype("07_outgrow_one_gpu", dtype, attach_lora=attach_lora)
        lesson.run("def gradient(rows", "by_own = ")
        found[dtype] = lesson
        off, parts = away(lesson["whole"], found["float32"]["whole"]), away(lesson["by_all"], lesson["whole"])
        say(
            f"lesson 07, {dtype}: {off:.5f} from fp32, two workers {parts:.7f}, own tokens {away(lesson['by_own'], lesson['whole']):.3f}"
        )
        assert off <= GRADIENT[dtype] and parts <= 1e-5 < away(lesson["by_own"], lesson["whole"])


def test_without_the_scale_fp16_would_lose_a_part_of_the_gradient(in_dtype, monkeypatch, say):
    """The tiny model's gradients are larger than a real one's, so they are made as small here, by dividing by more tokens."""

    def small(dtype: str) -> torch.Tensor:
        lesson = lesson_04(in_dtype, dtype)
        return lesson["gradient"]([lesson["four"]], lambda rows: 3000 * lesson["answer_tokens"])

    exact, scaled = small("float32"), small("float16")
    monkeypatch.setattr(scaffold, "LOSS_SCALE", 1)
    bare = small("float16")
    say(f"fp16 without the scale: {away(bare, exact):.4f} from fp32, with it {away(scaled, exact):.4f}")
    assert away(scaled, exact) < GRADIENT["float16"] < away(bare, exact)


def printed(text: str, words: str) -> float:
    """The number that follows `words` in what cells printed."""
    return float(re.search(re.escape(words) + r"\s*([-+\d.e]+)", text)[1])


def lesson_02(in_dtype, dtype: str) -> tuple[Lesson, str]:
    lesson = in_dtype("02_attach_lora", dtype, load_quantized=load_quantized, RANKS=(1, 4), STEPS=3, BATCH=2)
    said = lesson.run(
        "shapes_chart(outputs", "def logits_of", "lora = LoraConfig(", '(("A", A)', "after = logits_of(model)"
    )
    lesson["model"].zero_grad = lambda: None  # the cell would clear what the test compares
    said += lesson.run("(scale * loss).backward()")
    lesson.names["gradient"] = lesson["B"].grad.clone() / lesson["scale"]
    del lesson["model"].zero_grad
    return lesson, said


def test_lesson_02_begins_at_the_same_model_and_finds_the_same_gradient(in_dtype, say):
    exact = lesson_02(in_dtype, "float32")[0]["gradient"]
    for dtype in DTYPES:
        lesson, said = lesson_02(in_dtype, dtype)
        by_hand = printed(lesson.run("by_hand = "), "differ by at most")
        off, norm = away(lesson["gradient"], exact), printed(said, "gradient of B:")
        say(f"lesson 02, {dtype}: gradient {off:.5f} from fp32, by hand and by PEFT {by_hand}")
        assert (
            "equal, bit for bit: True" in said
            and "gradient of W: None" in said
            and printed(said, "gradient of A:") == 0
        )
        assert off <= GRADIENT[dtype] and norm == pytest.approx(exact.norm().item(), rel=0.02, abs=1e-6)
        assert by_hand <= 2 * torch.finfo(getattr(torch, dtype)).eps


def test_lesson_02_trains_and_merges_alike_in_every_format(in_dtype, tmp_path, monkeypatch, say):
    monkeypatch.chdir(tmp_path)
    exact: dict[int, Any] = {}
    for dtype in DTYPES:
        lesson, _ = lesson_02(in_dtype, dtype)
        tokens = short_examples(lesson["training"], lesson["tokenizer"], 4)
        lesson.names |= {"training": tokens, "validation": tokens}
        lesson.run("runs = {}")
        said = lesson.run("base, tokenizer = load_quantized(replace(config", "merged = model.merge_and_unload()")
        runs = lesson["runs"]
        exact = exact or runs
        losses = [
            abs(one - other) for rank, run in runs.items() for one, other in zip(run.training, exact[rank].training)
        ]
        merged, trained = (
            printed(said, "adapter and merged differ by at most"),
            printed(said, "without training differ by at most"),
        )
        say(
            f"lesson 02, {dtype}: losses at most {max(losses):.4f} from fp32; merged differs by {merged}, training by {trained}"
        )
        assert max(losses) <= LOSS[dtype] and all(run.after < run.before for run in runs.values())
        assert printed(said, "by hand differ by at most") <= torch.finfo(getattr(torch, dtype)).eps and merged < trained


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_lesson_01_packs_the_bytes_of_bitsandbytes_in_both_formats(rounded_model, monkeypatch, dtype):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("helpers.plots.picture", lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(rounded_model, dtype=getattr(torch, dtype))
    lesson = Lesson("01_load_quantized_model", torch=torch, model=model)
    said = lesson.run(
        "layers = {name: module",
        "nf4 = get_4bit_type",
        "scaled = blocks / absmax",
        "pairs = codes",
        "other_scales = ",
        "for block in (16, 64",
        "levels_256 = ",
        "ours_8 = ",
        "errors = {",
    )
    for words in ("bytes that differ from ours:", "scales that differ from ours:", "largest difference of a weight:"):
        assert printed(said, words) == 0
    assert (
        printed(said, "8-bit codes that differ from ours:") <= 1
        and len(lesson["errors"]["NF4"]) == len(lesson["layers"]) == 14
    )


@pytest.mark.parametrize("card", ["T4", "RTX 4060", "L4"])
@pytest.mark.parametrize("mode", ["off", "selective", "on"])
def test_lesson_04_writes_out_the_settings_that_the_kit_uses_on_a_card(card, mode, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    config = TrainConfig(name="course", model="Qwen2.5-1.5B-Instruct")
    plan = replace(make_plan(config, KNOWN_GPUS[card], exact=False), checkpointing=mode)
    for examples in (584, 100, 1234):
        steps = total_steps(config, examples)
        lesson = Lesson(
            "04_train",
            config=config,
            plan=plan,
            gpu=plan.gpu,
            training=range(examples),
            steps=steps,
            warmup=round(config.warmup_ratio * steps),
        )
        assert "different: none" in lesson.run("arguments = SFTConfig(", "different = {")
    assert plan.dtype == ("float16" if card == "T4" else "bfloat16")


def test_lesson_04_asks_the_dry_run_about_its_own_loop(monkeypatch):
    """Padded letters, all logits at once, nothing in host memory; and it prints the card's own figure beside it."""
    asked = []
    monkeypatch.setattr(
        "helpers.dryrun.measure", lambda step: asked.append(step) or SimpleNamespace(live_peak=len(asked) * 2**30)
    )
    config = TrainConfig(name="course", model="Qwen2.5-1.5B-Instruct")
    plan = replace(make_plan(config, KNOWN_GPUS["T4"], exact=False), offload=True)
    costs = {mode: SimpleNamespace(seconds=1.0, gpu_peak=3 * 2**20) for mode in ("off", "on")}
    two = [SimpleNamespace(ids=[0] * length) for length in (70, 90)]
    lesson = Lesson(
        "04_train",
        config=config,
        plan=plan,
        gpu=plan.gpu,
        model_id=plan.model,
        two=two,
        tries=[costs],
        seconds={"off": 1.0, "on": 1.5},
    )
    said = lesson.run("longest = ")
    assert "'off': '3 MiB on the card'" in said and "time: quoted +20%, here +50%" in said
    assert [step.checkpointing for step in asked] == ["off", "on"]
    for step in asked:
        assert (
            step.micro_batch,
            step.seq_len,
            step.masked,
            step.loss_head,
            step.offload,
            step.dtype,
            step.autocast,
        ) == (2, 90, True, "full", False, "float16", True)
