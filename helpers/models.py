"""Load a base model in 4 bit, attach an adapter, generate; write an adapter to disk and read it back.

model, tokenizer = load_quantized(config, plan)
model = attach_lora(model, config)
answers = generate(model, tokenizer, prompts)
"""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from helpers.compat import keep_weights_trainable, repeat_shared_keys
from helpers.config import ConfigError
from helpers.data.issues import DataError, first_line
from helpers.data.tokens import control_tokens
from helpers.files import ExportError, atomic_folder
from helpers.hardware import attention, count_as_free, loaded_model
from helpers.hub import WeightsError, limited_template
from helpers.plots import harmless, loss_chart, picture
from helpers.recipe import lora_config, quantization_config
from helpers.registry import OWN_CODE
from helpers.runs import WEIGHTS, Run, has_adapter
from helpers.weights import fetch_weights

if TYPE_CHECKING:
    from helpers.config import TrainConfig
    from helpers.plan import Plan

Messages = list[dict[str, str]]
# PEFT and TRL still call transformers by older names; nothing that a learner could act on.
warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6.*", category=FutureWarning)


def load_quantized(config: TrainConfig, plan: Plan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of `plan` with 4-bit NF4 weights, and its tokenizer. The model that was loaded before is released first."""
    release_last_model()
    repeat_shared_keys(attention(plan.gpu)[0] == "efficient")
    folder = fetch_weights(plan.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            quantization_config=quantization_config(config, plan),
            dtype=getattr(torch, plan.dtype),
            device_map={"": 0} if plan.gpu.kind == "cuda" else {"": plan.gpu.kind},
        )
    except (ValueError, OSError, ImportError) as error:
        why = OWN_CODE if "trust_remote_code" in str(error) else f"cannot be loaded: {first_line(error)}"
        raise WeightsError(f"{folder} {why}") from error
    keep_weights_trainable(model)
    _calculate_in(model, getattr(torch, plan.dtype))
    count_as_free(model)
    model.made_of = {"model": plan.model, "quantization": config.quantization, "dtype": plan.dtype}
    return model, tokenizer


def release_last_model() -> int:
    """Empty the model that `load_quantized` loaded before, even if a variable still names it; returns the bytes that came back.

    Its weights become empty tensors, so whoever still uses it is told so and does not keep a second copy in memory.
    """
    model, freed = loaded_model(), 0
    if model is not None:
        model.get_input_embeddings().register_forward_pre_hook(_say_released)  # whatever is done with it begins there
    for tensor in [*model.parameters(), *model.buffers()] if model is not None else []:
        freed += tensor.untyped_storage().nbytes()
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype)
        state = getattr(tensor, "quant_state", None)
        for scales in (state, getattr(state, "state2", None)):  # of a 4-bit weight, and of these scales
            if scales is not None and scales.absmax is not None:
                freed += scales.absmax.untyped_storage().nbytes()
                scales.absmax = None
    free_memory()
    if freed:
        print(f"Released the model that was loaded before: {freed / 2**20:.0f} MiB came back.")
    return freed


def _say_released(*args: object) -> None:
    raise ConfigError("This model was released when another was loaded: use that, or run the cell with load_quantized.")


def free_memory() -> None:
    """Return memory that no Python object uses any more to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _calculate_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have everything calculated in `dtype`, whatever the files say.

    Weights that came in 4 bit stay as they were saved, mostly with bf16 around them, which a T4 can only emulate.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = dtype
    for parameter in model.parameters():
        # Packed 4-bit weights may be stored under the name of a 16-bit type (bnb_4bit_quant_storage): their bytes are no numbers.
        if parameter.dtype in (torch.bfloat16, torch.float16) and not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.to(dtype)


def attach_lora(model: PreTrainedModel | PeftModel, config: TrainConfig) -> PeftModel:
    """`model` with a fresh LoRA adapter beside its frozen weights; an adapter that is already there is dropped first."""
    set_seed(config.seed)  # the A matrices start at random values
    return get_peft_model(without_adapter(model), lora_config(config))


def without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The base model itself, with any LoRA layers taken out again (its weights were never changed).

    PEFT puts its layers into the base model, so a variable that names the base carries them too: both are cleaned.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if next(base.parameters()).numel() == 0:
        _say_released()
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, module.get_base_layer())
    base.__dict__.pop("peft_config", None)  # else PEFT warns about a second adapter
    base.made_of = getattr(base, "made_of", {}) | {"adapter": None}
    return base


@torch.inference_mode()
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    max_new_tokens: int = 128,
    batch_size: int = 48,
) -> list[str]:
    """Greedy answers to chat prompts, in order. Generated in batches, padded on the left so that all end together."""
    refuse_control_tokens(prompts, tokenizer)
    was_training, answers, padding = model.training, [], tokenizer.pad_token_id
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            with limited_template():
                batch = tokenizer.apply_chat_template(
                    prompts[start : start + batch_size],
                    add_generation_prompt=True,
                    padding=True,
                    tokenizer_kwargs={"padding_side": "left"},
                    return_dict=True,
                    return_tensors="pt",
                ).to(model.device)
            tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding)
            written = tokens[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    finally:
        model.train(was_training)
    return answers


def refuse_control_tokens(prompts: list[Messages], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DataError` if a text holds what the tokenizer reads as the start or the end of a turn, and not as text."""
    control = control_tokens(tokenizer)
    for found in (control.search(message["content"]) for prompt in prompts for message in prompt):
        if found:
            raise DataError(
                f"A prompt holds {found[0]}, which this tokenizer does not read as text: write it otherwise."
            )


def save_adapter(run: Run, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write adapter (safetensors), tokenizer, chat template and loss curve to `run.adapter`, whole or not at all."""
    for adapter in model.peft_config.values():  # name the model, not the cache folder of this machine
        adapter.base_model_name_or_path = run.settings["model"]
    png = b""
    with harmless():
        png = picture(loss_chart(run.history, title=run.settings["name"])).data
    with atomic_folder(run.adapter) as draft:
        model.save_pretrained(draft, save_embedding_layers=False)  # the embeddings are frozen
        tokenizer.save_pretrained(draft)
        if png:
            (draft / "loss.png").write_bytes(png)
        (draft / "README.md").unlink(missing_ok=True)  # a form by PEFT with nothing filled in
    return run.adapter


def finished_adapter(source: Run | str | Path) -> Path:
    """The adapter folder of a finished run; a folder is taken as it is, so an unfinished run can be exported by naming its adapter."""
    if isinstance(source, Run) and not source.finished:
        raise ExportError(
            f"{source.folder} is not finished: run its train cell again to go on, or name the folder {source.adapter} "
            "itself if what it has learned so far is enough."
        )
    folder = source.adapter if isinstance(source, Run) else Path(source)
    if not has_adapter(folder):
        raise FileNotFoundError(f"No whole adapter in {folder.resolve()}: train first, or check the folder's name.")
    return folder


def load_adapter(folder: str | Path, base_model: PreTrainedModel | PeftModel) -> PeftModel:
    """`base_model` with the adapter in `folder` (`ExportError`: of another base model). One that it already carries is dropped."""
    folder, base = finished_adapter(folder), without_adapter(base_model)
    _check_layers(folder, base)
    model = PeftModel.from_pretrained(base, str(folder))
    keep_weights_trainable(model)
    base.made_of["adapter"] = folder.resolve()
    return model


def _check_layers(folder: Path, base: PreTrainedModel) -> None:
    """Does every LoRA pair find a layer of its size? PEFT itself ignores pairs without a layer, and raises a page for the others."""
    linear = {name: layer for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear)}
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in linear.items()}
    with safe_open(folder / WEIGHTS, "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name in [name for name in shapes if ".lora_A." in name]:
        layer = name.removeprefix("base_model.model.").split(".lora_A.")[0]
        wanted = (shapes[name.replace(".lora_A.", ".lora_B.")][0], shapes[name][1])
        if sizes.get(layer) != wanted:
            raise wrong_base(folder, layer, wanted, sizes.get(layer))


def wrong_base(folder: Path, layer: str, wanted: tuple[int, int], found: tuple[int, ...] | None) -> ExportError:
    """The error for an adapter whose layers are not those of the base."""
    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    there = f"is {found[0]} x {found[1]}" if found else "does not exist"
    return ExportError(
        f"The adapter in {folder} was trained on {name} and does not fit this base model, where {layer} {there} "
        f"instead of {wanted[0]} x {wanted[1]}: load the base it names."
    )
