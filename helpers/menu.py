"""Which model for which card: the menu, whether each model fits, and what "auto" means.

    model_id, reason = choose_model(config, gpu)
    python -m helpers.menu "RTX 4060"           # for a card that you need not own

By the formula alone, so instant; `helpers.planner.make_plan` then plans the chosen model exactly.
"""

from __future__ import annotations

from argparse import ArgumentParser

from helpers import setup
from helpers.config import ConfigError, TrainConfig
from helpers.hardware import GIB, KNOWN_GPUS, Gpu
from helpers.plan import Plan
from helpers.planner import DoesNotFit, make_plan
from helpers.registry import BUNDLED_MODEL, CATALOG, BaseModel, resolve

# What "auto" tries on a GPU, best first: ungated, and with a plain chat template. (SmolLM3 and Qwen3 think aloud before they answer,
# which a first fine-tuning should not have to deal with.)
AUTO_MODELS = ["Qwen2.5-1.5B-Instruct", "SmolLM2-1.7B-Instruct", "Qwen2.5-0.5B-Instruct"]


def choose_model(config: TrainConfig, gpu: Gpu, hub_reachable: bool | None = None) -> tuple[str, str]:
    """(Hub id or folder to train, why). "auto" takes the best ungated model of the menu that fits, or the bundled one.

    Args:
        hub_reachable: does the Hugging Face Hub answer? None: it is asked, if that matters.
    """
    if config.model != "auto":
        return resolve(config.model), "chosen in the config"
    bundled = "the bundled 135M model, because"
    if gpu.kind != "cuda":
        return BUNDLED_MODEL, f"{bundled} there is no CUDA GPU"
    if not (setup.hub_reachable() if hub_reachable is None else hub_reachable):
        return BUNDLED_MODEL, f"{bundled} the Hugging Face Hub does not answer"
    for row in map(CATALOG.__getitem__, AUTO_MODELS):
        if fit_status(config, gpu, row)[0] != "no":
            return row.id, "the first ungated model of our short list that fits this card"
    return BUNDLED_MODEL, f"{bundled} nothing larger fits this card"


def fit_status(config: TrainConfig, gpu: Gpu, row: BaseModel) -> tuple[str, Plan | None]:
    """("fits", "tight" or "no", the formula's plan): tight means shorter examples, host memory, or one example at a time."""
    try:
        plan = make_plan(config, gpu, row, exact=False)
    except (DoesNotFit, ConfigError):
        return "no", None
    room = max((mode.most_examples(plan.seq_len) for mode in plan.modes), default=plan.micro_batch)
    barely = room == 1 < config.effective_batch_size and not config.micro_batch_size
    return ("tight" if barely or plan.offload or plan.seq_len < config.max_length else "fits"), plan


def main() -> None:
    """Print the menu for a card: which model fits, and how."""
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("card", choices=KNOWN_GPUS, metavar="CARD", help="one of: " + ", ".join(KNOWN_GPUS))
    parser.add_argument("--max-length", type=int, default=TrainConfig.max_length, help="longest example in tokens")
    arguments = parser.parse_args()
    for name, row in CATALOG.items():
        status, plan = fit_status(TrainConfig(max_length=arguments.max_length), KNOWN_GPUS[arguments.card], row)
        how = ""
        if plan is not None:
            peak = f"about {(plan.peak_bytes or 0) / GIB:.1f} GiB"
            how = f"micro-batch {plan.micro_batch}, checkpointing {plan.checkpointing}, {peak}"
        print(f"{status:<6}{name:<26}{row.shape.parameters() / 1e9:5.1f}B  {how}")


if __name__ == "__main__":
    main()
