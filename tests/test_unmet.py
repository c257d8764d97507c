"""What TRL asks for and free Colab does not have is not missed: shown on whatever versions are installed here.

`make test-colab` runs these on Colab's own versions (datasets 4.0.0 where TRL asks for 4.7, pyarrow 18.1.0 where it asks for 21), and
takes the list of unmet requirements and the name of the test for each from `tests/colab/check.py`.
"""

import math

import pyarrow
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from helpers.data import load_examples
from helpers.train import build_trainer


def test_trl_prepares_trains_and_evaluates_on_this_datasets(job, tmp_path):
    """Everything of `datasets` that a run touches: mapping and caching the tokens, columns, formats, batches, an evaluation."""
    trainer = build_trainer(**job, output_dir=tmp_path)
    assert isinstance(trainer.train_dataset, Dataset) and {"input_ids", "labels"} <= set(
        trainer.train_dataset.column_names
    )
    assert len(trainer.train_dataset) == len(job["training"]) and len(trainer.eval_dataset) == len(job["validation"])
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained = trainer.evaluate()["eval_loss"]
    assert trainer.state.global_step == 7 and math.isfinite(trained) and trained < untrained


def test_trl_accepts_the_other_kinds_of_this_datasets(job, tmp_path):
    """A stream and a dictionary of splits, which TRL tells apart by their classes."""
    from trl import SFTConfig, SFTTrainer

    def rows():
        yield from job["training"]

    settings = SFTConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=128,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    stream = IterableDataset.from_generator(rows)
    model = job["model"].dequantize() if hasattr(job["model"], "dequantize") else job["model"]
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=stream,
        eval_dataset=DatasetDict(held_out=job["validation"]),
        processing_class=job["tokenizer"],
    )
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_held_out_loss"])


def test_trl_and_the_reader_work_on_this_pyarrow(tmp_path):
    """TRL's own uses of pyarrow (it calls it for packing and nothing else), and ours: Parquet in and out."""
    from trl.data_utils import pack_dataset

    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10, 11]]})
    packed = pack_dataset(rows, seq_length=4, strategy="bfd", map_kwargs={"load_from_cache_file": False})
    assert sorted(token for row in packed for token in row["input_ids"]) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 4 for row in packed)
    wrapped = pack_dataset(rows, seq_length=4, strategy="wrapped", map_kwargs={"load_from_cache_file": False})
    assert [row["input_ids"] for row in wrapped] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]

    file = tmp_path / "letters.parquet"
    letters = [
        {"instruction": f"Letter {n}: where is my teapot?", "output": f"On its way, number {n}."} for n in range(12)
    ]
    Dataset.from_list(letters).to_parquet(file)
    read = load_examples(str(file))
    assert [example["completion"][0]["content"] for example in read] == [row["output"] for row in letters]
    table = pyarrow.Table.from_pylist(letters)
    assert load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path)).data.table.equals(
        table
    )


@pytest.mark.parametrize("package", ["trl", "bitsandbytes", "gguf", "rapidfuzz"])
def test_what_colab_gets_from_us_imports(package):
    __import__(package)
