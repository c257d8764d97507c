"""A step cut in any way gives the same loss and the same gradient; it is cut where it takes the least time, and fits."""

import random
import time
from dataclasses import replace
from itertools import chain, combinations, pairwise

import pytest
import torch
from conftest import make_job
from test_trainer import losses_of
from torch.nn.functional import cross_entropy
from trl import SFTTrainer
from trl.models import activation_offloading

import helpers.trainer as trainer_module
from helpers.compat import get_checkpointing
from helpers.cutting import Mode, NothingFits, Piece, cut, modes_of, quickest
from helpers.recipe import sft_config
from helpers.train import build_trainer, train

UNEVEN = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(2, 74, 3)]
OFF = Mode("off", False, ((40, 6), (100, 2)), 30.0, 1.0, 0.001)
ON = Mode("on", False, ((40, 9), (300, 2), (1000, 1)), 40.0, 1.3)


def test_the_cut_is_the_quickest_of_all_that_fit():
    """Against every way to cut up to seven sorted examples, each piece in the quicker of the modes that it fits in."""
    chance = random.Random(0)

    def seconds(lengths, start, end):
        rows, longest = end - start, lengths[end - 1]
        return min([m.seconds(rows, longest) for m in (OFF, ON) if rows <= m.most_examples(longest)], default=1e9)

    for _ in range(50):
        lengths = sorted(chance.choices(range(5, 400), k=chance.randint(1, 7)))
        every = [
            [0, *inner, len(lengths)]
            for count in range(len(lengths))
            for inner in combinations(range(1, len(lengths)), count)
        ]
        least = min(sum(seconds(lengths, *ends) for ends in pairwise(way)) for way in every)
        chance.shuffle(lengths)
        pieces = cut(lengths, [OFF, ON])
        assert sorted(example for piece in pieces for example in piece.examples) == list(range(len(lengths)))
        assert all(piece.longest == max(lengths[example] for example in piece.examples) for piece in pieces)
        found = sum((OFF, ON)[piece.mode].seconds(len(piece.examples), piece.longest) for piece in pieces)
        assert found == pytest.approx(least)


def test_an_example_without_room_is_refused():
    with pytest.raises(NothingFits, match="1001 tokens"):
        cut([10, 1001], [OFF, ON])


def test_halved_until_nothing_is_left():
    """By what failed, not by what was planned; one example is still tried; what has failed alone is not tried again."""
    assert ON.halved(2, 250).ladder == ((40, 7), (300, 1), (1000, 1))
    assert ON.halved(1, 250).ladder == ((40, 3), (300, 0), (1000, 0))
    mode, failures = ON, 0
    while pieces := [
        piece for length in (30, 300, 900) if (piece := mode.most_examples(length)) and (longest := length)
    ]:
        mode, failures = mode.halved(pieces[-1], longest), failures + 1
    assert failures < 9


def test_a_plain_plan_has_room_for_its_micro_batch_of_the_longest_examples(job):
    config, plan = job["config"], replace(job["plan"], seq_len=100, micro_batch=2, eval_batch=3, checkpointing="on")
    (mode,), evaluating = modes_of(config, plan)
    assert (mode.checkpointing, mode.offload) == ("on", False)
    assert [mode.most_examples(length) for length in (100, 66, 67, 50, 1, 101)] == [2, 3, 2, 4, 4, 0]  # 4 in a step
    assert [evaluating.most_examples(length) for length in (100, 6, 1)] == [3, 48, 48]  # config.max_eval_samples
    assert quickest([mode], 100) == (mode, 2) and quickest([mode], 101) == (mode, 1)

    forced, _ = modes_of(replace(config, micro_batch_size=2), plan)
    assert cut([5, 90, 80, 7], forced) == [Piece((0, 3), 0, 7), Piece((2, 1), 0, 90)]  # although all four would fit
    assert [len(piece.examples) for piece in cut([9, 8, 7, 6, 5], forced)] == [1, 2, 2]  # an epoch's last step


# ---------------------------------------------------------------------------------------------- the same gradient


def any_cut(chance):
    """Pieces of random examples, in random modes."""

    def cut_somewhere(lengths, modes):
        order = chance.sample(range(len(lengths)), len(lengths))
        ends = [0, *sorted(chance.sample(range(1, len(lengths)), chance.randrange(len(lengths)))), len(lengths)]
        parts = [tuple(order[start:end]) for start, end in pairwise(ends)]
        return [Piece(part, chance.randrange(len(modes)), max(lengths[each] for each in part)) for part in parts]

    return cut_somewhere


def double_loss(logits, labels, vocab_size, num_items_in_batch, **kwargs):
    """transformers' loss, which is in fp32, in fp64."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def fail_once(weight):
    """Run out of memory when this weight gets its gradient."""

    def fail(gradient):
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = weight.register_hook(fail)


def in_memory_of_a_cpu(**settings):
    return ORIGINAL(**settings | {"use_pin_memory": False, "use_streams": False})


ORIGINAL = activation_offloading.OffloadActivations


@pytest.mark.parametrize("quantization, dtype, bar", [("nf4", torch.float32, 1e-5), ("none", torch.float64, 1e-10)])
def test_a_step_cut_in_any_way_has_the_gradient_of_one_example_at_a_time(
    tiny_model, tmp_path, monkeypatch, say, quantization, dtype, bar
):
    """In all modes. The reference is written out: no padding, no trainer."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cpu"))
    monkeypatch.setattr(activation_offloading, "OffloadActivations", in_memory_of_a_cpu)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    job = make_job(tiny_model, UNEVEN, max_length=256, effective_batch_size=12, quantization=quantization)
    trainer = build_trainer(**job, output_dir=tmp_path)
    model, base = trainer.model.to(dtype), trainer.model.get_base_model()
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first, and with it the gradient of A
            torch.nn.init.normal_(weight, std=0.02)
    if dtype is torch.float64:
        base.loss_function, trainer.full_logits = double_loss, True
    (batch,), tokens = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))

    def gradient():
        found = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
        model.zero_grad()
        return found

    expected = 0.0
    for row, mask in zip(range(len(batch["labels"])), batch["attention_mask"].bool()):
        ids, labels = batch["input_ids"][row, mask][None], batch["labels"][row, mask][None]
        loss = double_loss(base(input_ids=ids).logits, labels, 0, tokens)
        loss.backward()
        expected += loss.item()
    reference, apart = gradient(), []
    ways = [("off", False), ("selective", False), ("on", False), ("on", True)]
    trainer.modes[:] = [Mode(*way, ((256, 12),), 1e4, 1.0) for way in ways]
    monkeypatch.setattr(trainer_module, "cut", any_cut(random.Random(0)))
    for number in range(11):
        if number == 10:  # out of memory in the middle of a backward pass, whose activations wait in host memory
            monkeypatch.setattr(trainer_module, "cut", cut)
            trainer.modes[:] = trainer.modes[-1:]
            fail_once([weight for weight in model.parameters() if weight.requires_grad][-1])
        loss = trainer.training_step(model, dict(batch), tokens).item()
        apart.append(((gradient() - reference).norm() / reference.norm()).item())
        assert loss == pytest.approx(expected, rel=bar)
    assert trainer.modes[0].most_examples(256) == 6
    say(f"{dtype}: the gradients of {len(apart)} random cuts are at most {max(apart):.1e} of it away")
    assert reference.norm() > 0 and max(apart) < bar


# ---------------------------------------------------------------------------------------------- the trainer


@pytest.fixture
def uneven(tiny_model):
    return make_job(tiny_model, UNEVEN, max_length=256, max_steps=6, effective_batch_size=6)


def test_a_step_has_the_examples_that_it_has_with_fixed_micro_batches(uneven, tmp_path):
    trainer, examples = build_trainer(**uneven, output_dir=tmp_path), len(uneven["training"])
    by_number = replace(uneven["plan"], micro_batch=2, accumulation=3)
    fixed = SFTTrainer(
        model=trainer.model,
        args=sft_config(uneven["config"], by_number, tmp_path, examples),
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=uneven["tokenizer"],
    )
    steps = []
    for each, rows_at_once in ((trainer, 6), (fixed, 2)):
        torch.manual_seed(7)
        loader = each.get_train_dataloader()
        assert len(loader) == -(-examples // rows_at_once)
        for _ in range(2):  # epochs
            steps.append(
                [row[mask.bool()].tolist() for b in loader for row, mask in zip(b["input_ids"], b["attention_mask"])]
            )
    assert steps[:2] == steps[2:] and steps[0] != steps[1] and len(steps[0]) == examples


def test_no_column_is_padding_in_all_rows(uneven, tmp_path, monkeypatch):
    original, shapes = SFTTrainer.compute_loss, {True: [], False: []}

    def seen(self, model, inputs, *args, **kwargs):
        assert inputs["attention_mask"].sum(1).max() == inputs["labels"].shape[1]
        shapes[model.training].append(inputs["input_ids"].shape)
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", seen)
    uneven["validation"] = uneven["training"]
    trainer = build_trainer(**uneven, output_dir=tmp_path)
    trainer.evaluate()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, batch)
    for training, lengths in (
        (True, batch["attention_mask"].sum(1)),
        (False, map(len, trainer.eval_dataset["input_ids"])),
    ):
        assert len(shapes[training]) > 1
        assert [shape[1] for shape in shapes[training]] == sorted(shape[1] for shape in shapes[training])
        assert sum(rows * columns for rows, columns in shapes[training]) < 1.2 * sum(lengths)


def test_a_step_counts_once_in_trls_metrics_whatever_the_number_of_its_pieces(uneven, tmp_path):
    found = []
    for micro_batch in (6, 2, 1):
        uneven["config"].micro_batch_size, uneven["plan"] = (
            micro_batch,
            replace(uneven["plan"], micro_batch=micro_batch),
        )
        trainer = build_trainer(**uneven, output_dir=tmp_path)
        for batch in trainer.get_train_dataloader():
            trainer.training_step(trainer.model, batch)
        assert [len(values) for values in trainer._metrics["train"].values()] == [
            len(trainer.get_train_dataloader())
        ] * 2 + [1]
        found.append(list(chain.from_iterable(trainer._metrics["train"].values())))
    assert found[0][-1] == sum(map(len, trainer.train_dataset["input_ids"]))
    assert found == [pytest.approx(found[0], rel=1e-4)] * 3


def test_the_history_has_the_speed_and_the_padding_of_each_logged_interval(uneven, tmp_path):
    """Here a step is the whole set."""
    uneven["config"].effective_batch_size = examples = len(uneven["training"])
    found = []
    for micro_batch in (examples, 0):
        uneven["config"].micro_batch_size, uneven["plan"] = (
            micro_batch,
            replace(uneven["plan"], micro_batch=micro_batch or 2),
        )
        uneven["config"].name, uneven["config"].max_steps = f"m{micro_batch}", 2
        began = time.perf_counter()
        run = train(**uneven, root=tmp_path)
        seconds, rows = time.perf_counter() - began, [event for event in run.history if "loss" in event]
        assert len(rows) == 2 and rows[0]["padding"] == rows[1]["padding"]
        assert all(event["tokens_per_second"] > rows[0]["num_tokens"] / seconds for event in rows)
        found.append(rows[0]["padding"])
    lengths = [len(row) for row in build_trainer(**uneven, output_dir=tmp_path).train_dataset["input_ids"]]
    assert found[0] == pytest.approx(1 - sum(lengths) / (examples * max(lengths)), abs=1e-4)
    assert 0 < found[1] < found[0] / 3


def test_only_the_mode_that_ran_out_is_lowered_and_a_last_resort_comes_last(uneven, tmp_path, monkeypatch, capsys):
    """A card on which more than 300 tokens at once run out without checkpointing, and more than 100 of one example."""
    undisturbed = losses_of(train(**uneven, root=tmp_path / "undisturbed"))
    original, failures = SFTTrainer.training_step, []

    def small_card(self, model, inputs, *args, **kwargs):
        rows, columns = inputs["input_ids"].shape
        if get_checkpointing(model) == "off" and (rows * columns > 300 or columns > 100):
            failures.append((rows, columns))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", small_card)
    job = make_job(
        tiny_model=uneven["config"].model, alpaca_rows=UNEVEN, max_length=256, max_steps=6, effective_batch_size=6
    )
    run = train(**job, root=tmp_path)
    assert losses_of(run) == pytest.approx(undisturbed, abs=1e-4)
    said = capsys.readouterr().out
    assert said.count("Out of memory after step") == len(failures) > 1
    assert (
        "checkpointing off. From now on at most 1 x" in said and ", checkpointing on. What failed is done again" in said
    )
    assert (run.plan["micro_batch"], run.plan["checkpointing"]) == (1, "on")  # for a fixed cut of the longest examples
