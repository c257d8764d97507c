"""Which model for which card: the menu with its traffic lights, and what "auto" means.

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
    if gpu.kind != "cuda":
        return BUNDLED_MODEL, "the bundled 135M model, because there is no CUDA GPU"
    if not (setup.hub_reachable() if hub_reachable is None else hub_reachable):
        return BUNDLED_MODEL, "the bundled 135M model, because the Hugging Face Hub does not answer"
    for name in AUTO_MODELS:
        if fit_status(config, gpu, CATALOG[name])[0] != "no":
            return CATALOG[name].id, "the first ungated model of our short list that fits this card"
    return BUNDLED_MODEL, "the bundled 135M model, because nothing larger fits this card"


def fit_status(config: TrainConfig, gpu: Gpu, row: BaseModel) -> tuple[str, Plan | None]:
    """("fits", "tight" or "no", the formula's plan): tight means shorter examples, host memory, or micro-batch 1."""
    try:
        plan = make_plan(config, gpu, row, exact=False)
    except (DoesNotFit, ConfigError):
        return "no", None
    barely = plan.micro_batch == 1 and plan.checkpointing == "on" and plan.peak_bytes > 0.95 * plan.budget
    return ("tight" if barely or plan.offload or plan.seq_len < config.max_length else "fits"), plan


def plan_table(models: list[str], gpu: Gpu, config: TrainConfig | None = None) -> list[dict[str, object]]:
    """One row per model: does it fit this card, and how. By the formula, so instant; for `pandas.DataFrame` or a menu."""
    rows: list[dict[str, object]] = []
    for name in models:
        row = CATALOG[name]
        light, plan = fit_status(config or TrainConfig(), gpu, row)
        rows.append(
            {
                "model": name,
                "parameters": row.shape.parameters(),
                "gated": row.gated,
                "license": row.license,
                "fits": light,
                "micro_batch": plan and plan.micro_batch,
                "checkpointing": plan and plan.checkpointing,
                "seq_len": plan and plan.seq_len,
                "peak_gib": plan and round(plan.peak_bytes / GIB, 1),
            }
        )
    return rows


def main() -> None:
    """Print the menu for a card: which model fits, and how."""
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("card", choices=KNOWN_GPUS, metavar="CARD", help="one of: " + ", ".join(KNOWN_GPUS))
    parser.add_argument("--max-length", type=int, default=TrainConfig.max_length, help="longest example in tokens")
    arguments = parser.parse_args()
    for row in plan_table(list(CATALOG), KNOWN_GPUS[arguments.card], TrainConfig(max_length=arguments.max_length)):
        how = (
            f"micro-batch {row['micro_batch']}, checkpointing {row['checkpointing']}, about {row['peak_gib']} GiB"
            if row["peak_gib"]
            else ""
        )
        print(f"{row['fits']:<6}{row['model']:<26}{row['parameters'] / 1e9:5.1f}B  {how}")


if __name__ == "__main__":
    main()
