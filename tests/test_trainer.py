"""The arithmetic of training: what must come out the same, whichever way it is calculated."""

from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from conftest import make_job
from transformers import TrainerControl, TrainerState
from trl import SFTTrainer

from helpers.callbacks import LossGuard, TrainingStopped
from helpers.checkpoints import latest_complete
from helpers.models import generate
from helpers.planner import DoesNotFit
from helpers.runs import Run
from helpers.train import build_trainer, train
from helpers.trainer import held_to_free_memory, is_out_of_memory

# Answers of very different lengths, so that a mean over batches is not the mean over tokens.
UNEVEN = [{"instruction": f"Count to {n}.", "output": " ".join(str(i) for i in range(1, n + 1))} for n in range(1, 25)]


def losses_of(run):
    return [event[key] for event in run.history for key in ("loss", "eval_loss") if key in event]


@pytest.fixture
def uneven(tiny_model):
    return make_job(tiny_model, UNEVEN, max_length=256, max_steps=6)


def gradient_of(trainer, batch):
    """All gradients of one batch, in a row."""
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.requires_grad])


# ----------------------------------------------------------------------------------------------- evaluation


def test_the_validation_loss_does_not_depend_on_the_batch(uneven, tmp_path, say):
    losses = []
    for size in (1, 2, 8):
        uneven["plan"] = replace(uneven["plan"], eval_batch=size)
        losses.append(build_trainer(**uneven, output_dir=tmp_path).evaluate()["eval_loss"])
    say(f"evaluation in batches of 1, 2, 8: {losses}")
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_the_validation_loss_is_the_mean_over_all_answer_tokens(uneven, tmp_path):
    """Against a cross-entropy written out by hand."""
    trainer = build_trainer(**uneven, output_dir=tmp_path)
    base, losses = trainer.model.get_base_model().eval(), []
    for row in trainer.eval_dataset:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = base.lm_head(base.model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state)[0, :-1]
        losses += [-logits.log_softmax(-1)[place, label].item() for place, label in enumerate(labels) if label != -100]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_gradients_are_the_same_before_and_after_evaluating_and_generating(uneven, tmp_path, say):
    trainer = build_trainer(**uneven, output_dir=tmp_path)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, and with it the gradient of A
            torch.nn.init.normal_(parameter, std=0.02)
    batch = next(iter(trainer.get_train_dataloader()))
    before = gradient_of(trainer, batch)
    trainer.evaluate()
    generate(trainer.model, uneven["tokenizer"], [[{"role": "user", "content": "hello"}]], max_new_tokens=4)
    apart = ((before - gradient_of(trainer, batch)).abs().max() / before.abs().max()).item()
    say(f"gradients before and after an evaluation: {apart:.1e} apart")
    assert apart < 1e-6


# ----------------------------------------------------------------------------------------------- accumulation


@pytest.mark.slow
def test_accumulation_is_exact_with_uneven_lengths(tiny_model, tmp_path, say):
    curves = []
    for size in (8, 4, 2, 1):
        sizes = {"effective_batch_size": 8, "micro_batch_size": size, "name": f"m{size}"}
        job = make_job(tiny_model, UNEVEN, max_length=256, max_steps=6, **sizes)
        curves.append(losses_of(train(**job, root=tmp_path)))
    worst = max(abs(a - b) for curve in curves[1:] for a, b in zip(curves[0], curve))
    say(f"8x1, 4x2, 2x4, 1x8: loss curves at most {worst:.1e} apart")
    assert len(curves[0]) > 8 and worst < 1e-4


# ----------------------------------------------------------------------------------------------- out of memory


def run_out_once(monkeypatch, owner, name, call):
    """Make `owner.name` raise CUDA's error at its `call`-th call, after it has done its work."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    monkeypatch.setattr(owner, name, failing)
    return calls


TWO_MICRO_BATCHES = {"max_length": 256, "max_steps": 4, "effective_batch_size": 8, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory):
    job = make_job(tiny_model, UNEVEN, **TWO_MICRO_BATCHES)
    return losses_of(train(**job, root=tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, owner, name, call",
    [
        ("forward", SFTTrainer, "compute_loss", 10),  # eval_on_start needs the first calls
        ("backward", torch.Tensor, "backward", 2),
        ("backward of a later step", torch.Tensor, "backward", 6),
        ("evaluation", SFTTrainer, "prediction_step", 2),
    ],
)
def test_a_run_survives_running_out_of_memory(
    tiny_model, tmp_path, monkeypatch, capsys, undisturbed, say, place, owner, name, call
):
    job = make_job(tiny_model, UNEVEN, **TWO_MICRO_BATCHES)
    job["plan"] = replace(job["plan"], eval_batch=2)
    calls = run_out_once(monkeypatch, owner, name, call)
    run = train(**job, root=tmp_path)
    assert len(calls) >= call and "Out of memory" in capsys.readouterr().out
    worst = max(abs(a - b) for a, b in zip(losses_of(run), undisturbed, strict=True))
    say(f"out of memory in {place}: losses at most {worst:.1e} from the undisturbed run's")
    assert run.finished and worst < 1e-4
    assert run.plan["eval_batch"] == 1 if place == "evaluation" else run.plan["micro_batch"] == 2


@pytest.mark.parametrize("owner, name", [(torch.Tensor, "backward"), (torch.optim.AdamW, "step")])
def test_with_nothing_left_to_try_it_says_what_would_fit(job, tmp_path, monkeypatch, owner, name):
    """In a step, whatever was made smaller; or in the optimizer, whose state is made in the first step and has no smaller piece."""

    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    job["config"].num_evaluations = 1
    monkeypatch.setattr(owner, name, never)
    with pytest.raises(DoesNotFit, match=r"something else uses its memory.*No checkpoint was written yet"):
        train(**job, root=tmp_path)


@pytest.mark.parametrize(
    "error, wanted",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_known_by_what_cuda_and_its_libraries_say(error, wanted):
    assert is_out_of_memory(error) is wanted


def test_on_windows_pytorch_may_take_what_is_free_on_the_card_and_not_the_drivers_spill(monkeypatch):
    """Of 8 GiB, the context and the desktop have 2, PyTorch has reserved 3 for the model, and 3 are free: its allocator may have 6."""
    limits = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", limits.append)
    with held_to_free_memory("linux"):
        assert limits == []
    with pytest.raises(KeyError), held_to_free_memory("win32"):
        assert limits == [6 / 8]
        raise KeyError
    assert limits == [6 / 8, 1.0]  # given back, whatever happened


def test_other_errors_are_not_swallowed(job, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(torch.Tensor, "backward", wrong)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(**job, root=tmp_path)


# ----------------------------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("when", ["training", "validation"])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(job, tmp_path, monkeypatch, when):
    original = SFTTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        wrong = self.state.global_step == 4 and self.model.training == (when == "training")
        return loss * float("nan") if wrong else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", poisoned)
    step = 5 if when == "training" else 4
    with pytest.raises(
        TrainingStopped, match=rf"{when} loss at step {step} .*Likely cause: a learning rate.*checkpoint of"
    ):
        train(**job, root=tmp_path)
    assert latest_complete(tmp_path / "tiny").name == ("checkpoint-4" if when == "training" else "checkpoint-2")
    assert not Run.load(tmp_path / "tiny").finished
    monkeypatch.undo()
    assert train(**job, root=tmp_path).finished


def test_ten_skipped_steps_in_a_row_stop_the_run_and_nine_do_not():
    guard = LossGuard()

    def steps(number, skipped=True):
        for step in range(number):
            optimizer = SimpleNamespace(step_was_skipped=skipped)
            guard.on_step_end(None, TrainerState(global_step=step), TrainerControl(), optimizer=optimizer)

    for _ in range(2):
        steps(9)
        steps(1, skipped=False)
    with pytest.raises(TrainingStopped, match="10 steps in a row, up to step 9"):
        steps(10)


# ----------------------------------------------------------------------------------------------- 4-bit truth


def test_nf4_is_what_the_paper_says(say):
    """Scales and nearest levels from the definition in the QLoRA paper (arXiv 2305.14314, section 3), against bitsandbytes."""
    torch.manual_seed(0)
    weight, levels = torch.randn(256, 128) * 0.02, bnb_functional.get_4bit_type("nf4", device="cpu")
    packed, state = bnb_functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales[:, 0], state.absmax)
    ours = levels[(blocks / scales)[..., None].sub(levels).abs().argmin(-1)] * scales
    theirs = bnb_functional.dequantize_4bit(packed, state)
    say(f"NF4 against 32 bit: {((theirs - weight).norm() / weight.norm()).item():.1%} of the weight's norm is lost")
    assert (ours.reshape(weight.shape) - theirs).abs().max() < 1e-3 * weight.abs().max()
