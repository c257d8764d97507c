"""Do the plans hold on a real CUDA card? Trains three steps of real-shape models with random weights, under the card's limit.

    python -m benchmarks.gpu [--limits 8 12 14.56] [--models Llama-3.2-1B-Instruct ...] [--steps 3] [--fp16]

For each limit (GiB) and model: plan for a card of that size, cap this process with `set_per_process_memory_fraction`, build the model
with random weights in NF4 on the card (nothing is downloaded), and train on the plan with the same trainer, recipe and loss head
as the notebooks. Prints predicted against measured memory; then tries the next faster candidate, which should not fit.
Each case runs in a process of its own, so that one out-of-memory error cannot spoil the next measurement. With `--fp16` the card is
planned as if it were a T4 (compute capability 7.5): fp16 with the gradient scaler, which any CUDA card can run:

    python -m benchmarks.gpu --fp16 --steps 50 --limits 14.56 --models Llama-3.2-1B-Instruct
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace

from helpers.catalog import CATALOG
from helpers.config import TrainConfig
from helpers.hardware import GIB, KNOWN_GPUS, Gpu, detect_gpu
from helpers.memory import CUDA_CONTEXT
from helpers.planner import CHECKPOINTING, DoesNotFit, Plan, make_plan, step_of

MODELS = [
    "Llama-3.2-1B-Instruct",
    "Llama-3.2-3B-Instruct",
    "Mistral-7B-Instruct-v0.3",
    "Llama-3.1-8B-Instruct",
    "Llama-2-13b-chat-hf",
]
CONFIG = TrainConfig(max_length=1024, effective_batch_size=8, num_train_epochs=1, evaluations=1, eval_examples=2)


def limited(gpu: Gpu, gib: float, fp16: bool = False) -> Gpu:
    """`gpu` as if it had `gib` GiB in all, and with `fp16` as if it had no bf16 either."""
    capability = KNOWN_GPUS["T4"].capability if fp16 else gpu.capability
    return replace(gpu, total_bytes=int(gib * GIB), free_bytes=int(gib * GIB), capability=capability)


def next_faster(plan: Plan) -> Plan | None:
    """The candidate just above the plan: a larger micro-batch, or else less checkpointing with the same one."""
    if plan.accumulation > 1:
        micro_batch = min(
            d for d in range(plan.micro_batch + 1, CONFIG.effective_batch_size + 1) if CONFIG.effective_batch_size % d == 0
        )
        return replace(
            plan, micro_batch=micro_batch, accumulation=CONFIG.effective_batch_size // micro_batch, eval_batch=micro_batch
        )
    index = CHECKPOINTING.index(plan.checkpointing)
    return replace(plan, checkpointing=CHECKPOINTING[index - 1]) if index else None


def train_here(name: str, gib: float, steps: int, faster: bool, fp16: bool) -> dict[str, object]:
    """Plan and train in this process; what was predicted and what was measured, in MiB."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTTrainer

    from helpers.dryrun import dry_run
    from helpers.loss_head import use_loss_head
    from helpers.models import attach_lora
    from helpers.recipe import sft_config

    gpu = limited(detect_gpu(), gib, fp16)
    shape = CATALOG[name].shape
    plan = make_plan(CONFIG, gpu, CATALOG[name])
    if faster:
        plan = next_faster(plan)
        if plan is None:
            return {"plan": "nothing faster exists"}
    step = step_of(CONFIG, plan, shape)
    predicted = dry_run(replace(step, load_in=""))
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (gib * GIB - CUDA_CONTEXT) / torch.cuda.get_device_properties(0).total_memory)
    )

    # Random weights of the real shape: built layer by layer on the card in 16 bit, quantised as bitsandbytes does when it loads.
    settings = shape.to_config()
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    dtype = getattr(torch, plan.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    quantise_randomly(model, dtype)
    model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)

    rows = Dataset.from_dict({"input_ids": [[7] * plan.seq_len] * (steps * CONFIG.effective_batch_size)})
    with tempfile.TemporaryDirectory() as folder:
        arguments = sft_config(replace(CONFIG, max_steps=steps), plan, folder, len(rows))
        arguments.eval_strategy = arguments.save_strategy = "no"
        arguments.load_best_model_at_end = arguments.eval_on_start = False
        arguments.logging_steps = 1
        use_loss_head(plan)
        trainer = SFTTrainer(
            attach_lora(model, CONFIG), arguments, train_dataset=rows, processing_class=tokenizer_for(shape.vocab_size)
        )
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        torch.cuda.reset_peak_memory_stats()
        out = trainer.train()
    return {
        "plan": f"micro-batch {plan.micro_batch} x {plan.accumulation}, checkpointing {plan.checkpointing}, {plan.seq_len} tokens",
        "predicted_allocated": predicted.allocated >> 20, "measured_allocated": torch.cuda.max_memory_allocated() >> 20,
        "predicted_reserved": predicted.reserved >> 20, "measured_reserved": torch.cuda.max_memory_reserved() >> 20,
        "seconds_per_step": round(out.metrics["train_runtime"] / steps, 2), "loss": round(out.metrics["train_loss"], 3),
        "finite_losses": sum(math.isfinite(event["loss"]) for event in trainer.state.log_history if "loss" in event),
        "dtype": plan.dtype, "gradient_scaler": trainer.accelerator.scaler is not None,
        "adapters": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
    }  # fmt: skip


def quantise_randomly(model, dtype) -> None:
    """Fill a model on the meta device: linear layers with random NF4 weights, everything else with small random numbers, on the card."""
    import bitsandbytes as bnb
    import torch

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear and name != "lm_head":
                weight = torch.randn(linear.out_features, linear.in_features, dtype=dtype, device="cuda") * 0.02
                new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype,
                                        compress_statistics=True, quant_type="nf4", device="meta")  # fmt: skip
                new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new)
                new.weight = new.weight._quantize("cuda")
                if linear.bias is not None:
                    new.bias = torch.nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device="cuda"), requires_grad=False)
                setattr(parent, name, new)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.ones if parameter.dim() == 1 else torch.randn
                filled = value(parameter.shape, dtype=parameter.dtype, device="cuda") * (1 if parameter.dim() == 1 else 0.02)
                setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
        if hasattr(module, "inv_freq"):  # rotary embeddings hold buffers that are computed, not loaded
            fresh = type(module)(config=model.config, device="cuda")
            module._buffers.update(fresh._buffers)
    model.tie_weights()


def tokenizer_for(vocabulary: int):
    """A tokenizer that is never asked anything: the examples are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "x": 1}, unk_token="x"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits", nargs="+", type=float, default=[8, 12, 14.56])
    parser.add_argument("--models", nargs="+", choices=list(CATALOG), default=MODELS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--fp16", action="store_true", help="plan as for a T4: fp16 and the gradient scaler")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "GIB", "FASTER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, gib, faster = arguments.one
        print(json.dumps(train_here(name, float(gib), arguments.steps, faster == "faster", arguments.fp16)))
        return 0
    if detect_gpu().kind != "cuda":
        print("no CUDA card here: nothing to measure")
        return 0
    failures = 0
    for gib in arguments.limits:
        for name in arguments.models:
            for kind in ("plan", "faster"):
                command = [sys.executable, "-m", "benchmarks.gpu", "--steps", str(arguments.steps), "--one", name, str(gib), kind]
                command += ["--fp16"] * arguments.fp16
                done = subprocess.run(command, capture_output=True, text=True)
                last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
                expected = done.returncode == 0 or kind == "faster" or DoesNotFit.__name__ in done.stderr
                failures += not expected
                print(
                    f"{gib:>6} GiB  {name:<28}{kind:<8}{last if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:200]}",
                    flush=True,
                )
    print("no unexpected failure" if not failures else f"{failures} plans did not hold")
    return failures


if __name__ == "__main__":
    sys.exit(main())
