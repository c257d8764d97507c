"""Fine-tune a language model with LoRA: transformers, PEFT and TRL, and nothing else.

    pip install -r requirements.txt
    python train.py [folder or name of the model]                # writes adapter/ and history.jsonl beside this file
    accelerate launch --config_file replicated.yaml train.py     # the same steps, shared among GPUs; or sharded.yaml

settings.json says what is trained and how, data/ holds the examples. Interrupted and started again, this goes on from its last
whole checkpoint.
"""

import json
import math
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SETTINGS = json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
MODEL = sys.argv[1] if len(sys.argv) > 1 else SETTINGS["model"]
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # `accelerate launch` starts one process per GPU
SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # each GPU holds a part of the weights
GPU = "cpu" if SHARDED else int(os.environ.get("LOCAL_RANK", 0))  # sharded: a layer reaches its GPU when it is cut
BATCH = SETTINGS["effective_batch_size"]  # examples in an optimizer step
EXAMPLES = BATCH // PROCESSES  # those of this process, which takes MICRO of them at a time
assert EXAMPLES * PROCESSES == BATCH, f"{BATCH} examples per step cannot be shared equally among {PROCESSES} processes"
MICRO = math.gcd(SETTINGS["sft"]["per_device_train_batch_size"], EXAMPLES)
# Whole checkpoints, the last step's last, whatever the clock says: the state is the last file that Trainer writes, "}" its end.
CHECKPOINTS = sorted(
    (
        f.parent
        for f in FOLDER.glob("checkpoints/*/trainer_state.json")
        if f.read_text(encoding="utf-8").endswith("\n}\n")
    ),
    key=lambda folder: int(folder.name.rpartition("-")[2]),
)

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # else TRL tells the Hub of every start
# Both are read when torch starts: one process trains on one card, and GPU memory in segments that grow has fewer holes.
if "WORLD_SIZE" not in os.environ:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.setdefault("PYTORCH_ALLOC_CONF", f"expandable_segments:{SETTINGS['expandable_segments']}")

import torch
import trl.kernels.chunked_logprob as trl_kernels
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, EarlyStoppingCallback, set_seed
from transformers.integrations import sdpa_attention
from trl import SFTConfig, SFTTrainer, models

quantization = SETTINGS["quantization"] and BitsAndBytesConfig(
    **SETTINGS["quantization"],
    # FSDP cuts numbers, not packed bytes; and it must not convert them, so they come as what is calculated in.
    bnb_4bit_quant_storage=SETTINGS["dtype"] if SHARDED else "uint8",
)
lora = LoraConfig(**SETTINGS["lora"])
args = SFTConfig(
    **SETTINGS["sft"]
    | {
        "output_dir": str(FOLDER / "checkpoints"),
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": EXAMPLES // MICRO,
        # One by one, so that an example that only fills up the last round can be told from the others.
        "per_device_eval_batch_size": SETTINGS["sft"]["per_device_eval_batch_size"] if PROCESSES == 1 else 1,
        "eval_on_start": not CHECKPOINTS,  # the untrained model was measured by the first start
        "restore_callback_states_from_checkpoint": True,  # early stopping remembers the best loss so far
        "ddp_find_unused_parameters": False,
    }
)


# Validation loss as the mean over all trained tokens. Trainer's own is the mean of its batches' means, so it depends on how
# examples of different length fall into batches.
class TokenMeanTrainer(SFTTrainer):
    def evaluation_loop(self, *args, **kwargs):
        self.sums = []  # (mean loss, trained tokens) of each batch
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = sum(loss * n for loss, n in self.sums) / sum(n for _, n in self.sums)
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        result = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        both = torch.stack([result[0].float(), tokens.float()])[None]
        # One row per process, less those of examples that only fill a batch.
        self.sums += self.accelerator.gather_for_metrics(both).tolist()
        return result


class EarlyStopping(EarlyStoppingCallback):  # the untrained model's loss does not count
    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step > 0:
            super().on_evaluate(args, state, control, **kwargs)


data = {
    part: Dataset.from_list([json.loads(line) for line in (FOLDER / f"data/{part}.jsonl").open(encoding="utf-8")])
    for part in ("training", "validation")
}

# TRL without its Triton kernels projects every token onto the vocabulary, masked ones too. This switch of TRL's own (internal,
# so it may go) leaves the masked ones out: the same loss with less memory and time.
if SETTINGS["fused_lm_head"] != "full":
    trl_utils._use_triton = lambda device: True
    trl_kernels._use_triton = lambda device: SETTINGS["fused_lm_head"] == "triton" and device.type == "cuda"
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = SETTINGS["lm_head_chunk_size"]
if SETTINGS["repeat_shared_keys"]:  # without flash attention: off PyTorch's slow math kernel (transformers#48633)
    sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False

model = AutoModelForCausalLM.from_pretrained(
    MODEL,
    trust_remote_code=False,  # no code comes with the weights, and no pickles
    use_safetensors=True,
    quantization_config=quantization,
    dtype=getattr(torch, SETTINGS["dtype"]),
    device_map={"": GPU if SETTINGS["device"] == "cuda" else SETTINGS["device"]},
)
for module in model.modules():  # on some CPUs bitsandbytes would repack the weights, and training is wrong after that
    module.support_avx512bf16_for_cpu = False

set_seed(args.seed)  # LoRA's A matrices start at random values
model = get_peft_model(model, lora)
adapters = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
trainer = TokenMeanTrainer(
    model=model,
    args=args,
    train_dataset=data["training"],
    eval_dataset=data["validation"],
    processing_class=AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False),
    callbacks=[EarlyStopping(count) for count in [SETTINGS["early_stopping_patience"]] if count],
)
# TRL has cast the adapters of a quantized model to bf16, which loses small updates and crashes fp16's gradient scaler
# (trl#4901): back to fp32, and to the very values that they had.
for name, value in trainer.model.named_parameters():
    if value.requires_grad:
        value.data = adapters[name].to(value.device)
# TRL's own switch for this does not reach a model inside PEFT with transformers 5.16 and newer.
if SETTINGS["checkpointing"] == "selective":
    models.enable_selective_activation_checkpointing(trainer.model.get_base_model())
trainer.train(resume_from_checkpoint=str(CHECKPOINTS[-1]) if CHECKPOINTS else None)
trainer.save_model(str(FOLDER / "adapter"))
if trainer.is_world_process_zero():
    (FOLDER / "history.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in trainer.state.log_history), encoding="utf-8"
    )
