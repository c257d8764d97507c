"""From a learner's file to examples that TRL understands.

    examples = load_examples("data_samples/customer_support.jsonl")     # or CSV, Parquet, a folder, a Hub id, a DataFrame
    training, validation = split(examples, validation_share=0.15, seed=42)
    print(check_examples("my_examples.csv", tokenizer, max_length=512))  # every problem, with line and fix
    show_tokens(examples[0], tokenizer)                                  # what is trained and what is masked

An example is two lists of chat messages, `prompt` and `completion`: the form in which TRL applies the model's own chat template and
counts the loss on the completion only. Plain `text` is kept as such, with the loss on every token.

How a file becomes examples, one room after the other:

    files ─► parsers (parse_json, parse_tables) ─► reading ─► formats ─► checks ─► loading ─► splitting
    bytes     one record per row                    any source  examples   │ rows, content, overview, duplicates, tokens
                                                                           └─► report
"""

from datasets import logging as datasets_logging

from helpers.data.check import check_examples, load_examples, to_messages
from helpers.data.issues import DataError
from helpers.data.read import upload
from helpers.data.report import Report, examples_table
from helpers.data.splitting import split
from helpers.data.tokens import check_tokens, ensure_chat_template, lengths, show_tokens

__all__ = [
    "DataError",
    "Report",
    "check_examples",
    "check_tokens",
    "ensure_chat_template",
    "examples_table",
    "lengths",
    "load_examples",
    "show_tokens",
    "split",
    "to_messages",
    "upload",
]

datasets_logging.disable_progress_bar()
