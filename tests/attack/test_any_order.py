"""Cells and panel moves in any order, with kills and full disks under them: what is recorded was trained, what was kept is kept.

`make attack` plays 300 sequences instead of 40. A failure prints its moves; `pytest tests/attack -k "[17]"` plays number 17 again.

A `Notebook`'s moves call the kit as cells and panel do; after each, `Rules` look at the disk.
"""

import builtins
import contextlib
import errno
import gc
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import traceback
from pathlib import Path
from unittest.mock import patch

import bitsandbytes as bnb
import pytest
import safetensors.torch
import torch
import transformers

from helpers import evaluation, export, models
from helpers.callbacks import TrainingStopped
from helpers.checkpoints import best_checkpoint, checkpoint_step, latest_complete
from helpers.data import DataError, load_examples, split
from helpers.hub import WeightsError
from helpers.panel.settings import Settings
from helpers.planner import GIB, ConfigError, DoesNotFit, Gpu, TrainConfig, make_plan
from helpers.runs import Run, delete_runs
from helpers.train import train

RUNS = Path("runs")
WATCHED = Path("watched")  # for each run, a file with what transformers was told to train, a line for each part
SEQUENCES, MOVES = (300 if os.environ.get("ATTACK") else 40), 8
CPU = Gpu("CPU", "cpu", 16 * GIB, 12 * GIB)
OWN_ERRORS = (ConfigError, DataError, DoesNotFit, export.ExportError, TrainingStopped, WeightsError)
VALUES = {  # of settings: what they begin with, another, and one that cannot work
    "name": ("one", "two", "../out"),
    "model": ("A", "B"),
    "data": ("red.jsonl", "blue.jsonl", "missing.jsonl"),
    "quantization": ("nf4", "none"),
    "max_length": (64, 96, 4096),
    "effective_batch_size": (2, 4),
    "r": (2, 4, 0),
    "learning_rate": (1e-3, 2e-3, "2e-4"),
    "max_steps": (2, 3, 0),
}
OTHERS = {"num_evaluations": 2, "early_stopping_patience": 0, "validation_share": 0.25}
CELLS = "change change change change train train train train stop stop export export make_plan load read evaluate delete ask"
WITH_FAULTS = ("train", "export", "evaluate")
# (module, function, which of its arguments names the file)
WRITES = [(builtins, "open", 0), (io, "open", 0), (os, "replace", 1), (os, "mkdir", 0), (torch, "save", 1)]
WRITES += [(safetensors.torch, "serialize_file", 1)]
DELETES = [(os, "unlink", 0), (os, "rmdir", 0)]


def is_own(error: BaseException) -> bool:
    """One of the kit's errors, or a plain one that a line of the kit raises with a sentence."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    plain = isinstance(error, (FileNotFoundError, ValueError)) and len(error.args) == 1
    return isinstance(error, OWN_ERRORS) or (plain and f"{os.sep}helpers{os.sep}" in last)


class Notebook:
    """The variables of a notebook. A cell whose variables are missing runs the cells that make them first."""

    def __init__(self, seed: int) -> None:
        self.random, self.rules = random.Random(seed), Rules()
        self.config = TrainConfig(**{name: values[0] for name, values in VALUES.items()}, **OTHERS)
        self.start_kernel()

    def start_kernel(self) -> None:
        """The settings are typed again; everything else is gone."""
        self.plan = self.model = self.tokenizer = self.parts = self.run = None

    def play(self) -> str:
        """One move, perhaps with a fault under it, and a look at the disk. Returns what was done and how it ended."""
        cell, at = self.random.choice(CELLS.split()), self.random.randrange(self.random.choice((5, 30, 120)))
        kind = self.random.choice(("", "", "full", "kill")) if cell in WITH_FAULTS else ""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if kind == "kill":
                end = self.do_and_be_killed(getattr(self, cell), at)
                self.start_kernel()
            else:
                with fault(at, kill=False) if kind else contextlib.nullcontext():
                    end = self.do(getattr(self, cell))
            self.rules.must((end_of_look := self.do(self.rules.look)) == "done", f"runs/ cannot be read: {end_of_look}")
        return f"{cell}{kind and f' ({kind} at write {at})'}: {end}"

    def do(self, action) -> str:
        """An error that is not the kit's breaks a rule."""
        try:
            return action() or "done"
        except Exception as error:
            self.rules.must(is_own(error), "a foreign error: " + "".join(traceback.format_exception(error)))
            return repr(error)

    def do_and_be_killed(self, action, at: int) -> str:
        """In a copy of this process, which gets a SIGKILL at write `at`, or when the cell is done."""
        said = Path("said")
        if not (child := os.fork()):
            with fault(at, kill=True):
                end = self.do(action)
            said.write_text("\0".join([end, *self.rules.broken]))
            os._exit(0)
        os.waitpid(child, 0)
        end, *self.rules.broken = said.read_text().split("\0") if said.is_file() else ["killed"]
        said.unlink(missing_ok=True)
        return end

    def change(self) -> str:
        name = self.random.choice(list(VALUES))
        value = self.random.choice(VALUES[name])
        if self.random.random() < 0.5:
            return f"{name}={value!r} by the panel: {Settings(self.config).edit({name: value}) or 'taken'}"
        setattr(self.config, name, value)
        return f"{name}={value!r}"

    def make_plan(self) -> None:
        self.plan = make_plan(self.config, CPU)

    def load(self) -> None:
        self.plan or self.make_plan()
        self.model, self.tokenizer = models.load_quantized(self.config, self.plan)

    def read(self) -> None:
        self.parts = split(load_examples(self.config.data), self.config.validation_share, self.config.seed)

    def train(self) -> None:
        self.model or self.load()
        self.parts or self.read()
        given, anew = (self.config, self.plan, self.model, self.tokenizer, *self.parts), self.random.random() < 0.2
        self.run = train(*given, root=RUNS, restart=anew)
        self.rules.returned(self.run, self.config)

    def stop(self) -> None:
        """The train cell, and the stop button, once or twice, in the middle of a step."""
        step, times = self.random.choice((0, 1, 2)), self.random.choice((1, 1, 2))

        def training_step(trainer, *args, original=transformers.Trainer.training_step, **kwargs):
            for _ in range(times if trainer.state.global_step == step else 0):
                signal.raise_signal(signal.SIGINT)
            return original(trainer, *args, **kwargs)

        with patch.object(transformers.Trainer, "training_step", training_step), contextlib.suppress(KeyboardInterrupt):
            self.train()

    def evaluate(self) -> None:
        self.run or self.train()
        evaluation.evaluate(self.run, self.tokenizer, self.parts[1], max_new_tokens=2, forgetting=False).save()

    def export(self) -> None:
        self.run or self.train()
        make = self.random.choice([export.merge, export.export_script, lambda run: export.zip_folder(run.adapter)])
        self.rules.files |= {(made := make(self.run)): digest(made)}

    def ask(self) -> None:
        self.model or self.load()
        self.model = models.load_adapter(self.run.adapter, self.model) if self.run else self.model
        models.generate(self.model, self.tokenizer, [[{"role": "user", "content": "red?"}]], max_new_tokens=2)

    def delete(self) -> None:
        for folder in self.random.choices(sorted(RUNS.glob("*")) or [Path("A")]):
            delete_runs(folder)
            self.rules.deleted(folder)


class Rules:
    """What must hold after every move; `broken` is what did not.

    Recorded is trained: the settings in run.json are those of every training that transformers did for this folder (`watch` saw it), the
    curve has each step once, and a run is finished after its last step only. Kept is kept: a finished run stays finished, with the same
    adapter; the last checkpoint of another run never goes back; exports and the user's own files stay what they were.
    """

    def __init__(self) -> None:
        self.broken = []
        self.adapters, self.reached = {}, {}  # run folder -> its finished adapter; step of its last checkpoint
        self.files = {path: digest(path) for path in Path().iterdir()}  # later also exports

    def must(self, holds: bool, otherwise: str) -> None:
        if not holds and otherwise not in self.broken:
            self.broken.append(otherwise)

    def look(self) -> None:
        for path, before in self.files.items():
            self.must(digest(path) == before, f"{path} is not what it was")
        for folder in (*self.adapters, *self.reached):
            self.must((folder / "run.json").is_file(), f"{folder.name} is lost")
        self.must(not Path("out").exists(), "something was written outside of runs/")
        for folder in sorted(path.parent for path in RUNS.glob("*/run.json")):
            self.look_at(Run.load(folder))

    def look_at(self, run: Run) -> None:
        name, steps = run.folder.name, [event["step"] for event in run.history if "loss" in event]
        file = WATCHED / name
        trainings = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        trained = [fact for training in trainings for fact in training.items()]
        wrong = {key: (run.settings[key], value) for key, value in trained if run.settings[key] != value}
        self.must(not wrong, f"{name} records what was not trained (recorded, trained): {wrong}")
        self.must(steps == sorted(set(steps)), f"{name} has a step twice: {steps}")
        self.must(bool(trainings) or not steps, f"{name} has a curve and was never trained")
        if run.finished:
            now = digest(run.adapter / models.WEIGHTS)
            self.must(safetensors.torch.load_file(run.adapter / models.WEIGHTS) != {}, f"{name} has an empty adapter")
            self.must(steps[-1:] == [run.settings["max_steps"]], f"{name} is finished after the steps {steps}")
            self.must(self.adapters.setdefault(run.folder, now) == now, f"{name} has another adapter now")
            self.reached.pop(run.folder, None)
        else:
            last, before = latest_complete(run.folder), self.reached.get(run.folder, 0)
            self.reached[run.folder] = checkpoint_step(last) if last else 0
            self.must(run.folder not in self.adapters, f"{name} was finished and is not any more")
            self.must(self.reached[run.folder] >= before, f"{name} has lost its checkpoint of step {before}")

    def returned(self, run: Run, config: TrainConfig) -> None:
        """`train` gave this run back for these settings; if it was stopped, it said that the best step so far is kept."""
        asked = config.to_dict().items()
        wrong = {key: (run.settings[key], value) for key, value in asked if run.settings[key] != value}
        self.must(not wrong, f"{run.folder.name} was given back for other settings (recorded, asked): {wrong}")
        best = None if run.finished else best_checkpoint(run.folder, run.best_step)
        kept = best is None or digest(best / models.WEIGHTS) == digest(run.adapter / models.WEIGHTS)
        self.must(kept, f"{run.folder.name} is said to keep step {run.best_step}, and its adapter is of another step")

    def deleted(self, folder: Path) -> None:
        for known in (self.adapters, self.reached, self.files):
            for path in [path for path in known if folder in (path, *path.parents)]:
                del known[path]
        (WATCHED / folder.name).unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder; of nothing if it is gone."""
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def watch(trainer: transformers.Trainer, *args, original=transformers.Trainer.train, **kwargs):
    """In place of `Trainer.train`: first write down what it will train, as the objects themselves have it."""
    told, base = trainer.args, trainer.model.get_base_model()
    example = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    file = WATCHED / Path(told.output_dir).parent.name
    facts = {
        "max_length": told.max_length,
        "effective_batch_size": told.per_device_train_batch_size * told.gradient_accumulation_steps,
        "r": trainer.model.peft_config["default"].r,
        "learning_rate": told.learning_rate,
        "max_steps": told.max_steps,
        "quantization": "nf4" if any(isinstance(layer, bnb.nn.Linear4bit) for layer in base.modules()) else "none",
        "model": base.name_or_path,
        "data": "red.jsonl" if "red" in example else "blue.jsonl",
    }
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(facts) + "\n")
    return original(trainer, *args, **kwargs)


@contextlib.contextmanager
def fault(at, kill):
    """Below runs/, write number `at` and all later ones find the disk full, or kill the process; weights are half written by then."""
    count = itertools.count()

    def wrap(module, name, which):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            place, mode = args[which], (*args[1:2], kwargs.get("mode", "r"))[0] if name == "open" else "w"
            below = kwargs.get("dir_fd") or RUNS.absolute() in Path(str(place)).absolute().parents
            if below and set("wax") & set(mode) and next(count) >= at:
                if module in (torch, safetensors.torch):
                    original(*args, **kwargs)
                    os.truncate(place, 9)
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return patch.object(module, name, wrapped)

    with contextlib.ExitStack() as stack:
        for call in WRITES + (DELETES if kill else []):
            stack.enter_context(wrap(*call))
        yield


@pytest.fixture(scope="module")
def folder_of_models(tiny_model, tmp_path_factory):
    """Two models, and two files of examples that differ in a color."""
    folder = tmp_path_factory.mktemp("start")
    for name in ("A", "B"):
        shutil.copytree(tiny_model, folder / name)
    for color in ("red", "blue"):
        rows = [{"instruction": f"What {color} number is {n}?", "output": f"It is {n * n}."} for n in range(12)]
        (folder / f"{color}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gc.collect()
    gc.freeze()  # else each of the kit's many collections walks through all of torch
    yield folder
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_any_order_of_cells_keeps_the_rules(seed, folder_of_models, tmp_path, monkeypatch):
    shutil.copytree(folder_of_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.Trainer, "train", watch)
    torch.set_num_threads(1)  # a process with several cannot be forked
    notebook, moves = Notebook(seed), []
    for _ in range(MOVES):
        moves.append(notebook.play())
        assert not notebook.rules.broken, "\n".join(["", *moves, "", *notebook.rules.broken])
