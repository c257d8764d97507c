"""From a learner's file to examples that TRL understands.

    examples = load_examples("data_samples/customer_support.jsonl")   # or CSV, Parquet, a folder, a Hub id, a DataFrame
    training, validation = split(examples, validation_share=0.15, seed=42)
    print(check_examples("my_examples.csv", tokenizer, max_length=512))  # every issue, with line and fix

An example is two lists of chat messages, `prompt` and `completion`, as TRL has them: the model's own chat template is
applied, and the loss counts the completion only. Plain `text` is kept as such, with the loss on every token.

    read ─► parse (bytes into records) ─► convert (a record into examples) ─► check ─► splitting
    issues: what can be wrong, and the report; tokens: what the model will see
"""

from datasets import logging as datasets_logging

from helpers.data.check import check_examples, load_examples
from helpers.data.issues import DataError, Report
from helpers.data.splitting import split
from helpers.data.tokens import ensure_chat_template, lengths

__all__ = ["DataError", "Report", "check_examples", "ensure_chat_template", "lengths", "load_examples", "split"]

datasets_logging.disable_progress_bar()
