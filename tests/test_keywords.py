"""Every keyword that we pass to transformers, PEFT, TRL, bitsandbytes, datasets and their relatives exists in the versions installed here.

The calls are found in the source (helpers, tools, notebooks, and the scripts that the kit writes), not listed by hand. Versions differ
between `make test` and `make test-colab`, so this runs in both. A name that a new release dropped fails here with file and line.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools import course

LIBRARIES = ("transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "huggingface_hub")
# Methods that hand **kwargs on, and the functions that read them there: looked up in the source of these.
READ_IN = {
    "transformers.AutoModelForCausalLM.from_pretrained": ["transformers.PreTrainedModel.from_pretrained"],
    "transformers.AutoModelForCausalLM.from_config": ["transformers.PreTrainedModel._from_config"],
    "transformers.LlamaForCausalLM.forward": ["trl.trainer.utils.add_fused_lm_head"],
    "transformers.AutoTokenizer.from_pretrained": [
        "transformers.models.auto.tokenization_auto.AutoTokenizer.from_pretrained",
        "transformers.PreTrainedTokenizerBase.from_pretrained",
    ],
    "transformers.AutoConfig.from_pretrained": [
        "transformers.PreTrainedConfig.get_config_dict",
        "transformers.PreTrainedConfig._get_config_dict",
    ],
    "transformers.GenerationMixin.generate": ["transformers.GenerationConfig.__init__"],
    "transformers.PreTrainedTokenizerBase.__call__": ["transformers.PreTrainedTokenizerBase._encode_plus"],
}
RETURNS = {
    "transformers.AutoModelForCausalLM.from_pretrained": "transformers.PreTrainedModel",
    "transformers.AutoModelForCausalLM.from_config": "transformers.PreTrainedModel",
    "transformers.AutoTokenizer.from_pretrained": "transformers.PreTrainedTokenizerBase",
    "peft.get_peft_model": "peft.PeftModel",
    "peft.PeftModel.from_pretrained": "peft.PeftModel",
    "datasets.Dataset.from_list": "datasets.Dataset",
}
ELSEWHERE = {
    "transformers.PreTrainedModel.generate": "transformers.GenerationMixin.generate",  # its subclasses inherit it from there
    "transformers.PreTrainedModel()": "transformers.LlamaForCausalLM.forward",  # a model that is called: any causal one will do
    "peft.PeftModel()": "transformers.LlamaForCausalLM.forward",
}
FREE = {"transformers.AutoConfig.for_model"}  # takes the fields of whichever model it is


@dataclass
class Call:
    place: str
    target: str
    """Dotted name, such as "trl.SFTConfig"."""
    keywords: list[str]


class Finder(ast.NodeVisitor):
    """Calls whose function can be traced to one of the libraries: by imports, annotations, assignments and base classes."""

    def __init__(self, file: str) -> None:
        self.file, self.names, self.calls = file, {}, []
        self.bases: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            whole = alias.name.partition(".")[0]
            self.names[alias.asname or whole] = alias.name if alias.asname else whole

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if node.module:
                self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """`x.new() if hasattr(x, "new") else ...` asks the version itself, so only the branch that would run counts."""
        self.visit(node.test)
        asked, branches = node.test, [node.body, node.orelse]
        if isinstance(asked, ast.Call) and getattr(asked.func, "id", "") == "hasattr":
            known = self.dotted(asked.args[0]) or ""
            if known.partition(".")[0] in LIBRARIES:
                branches = branches[:1] if exists(f"{known}.{asked.args[1].value}") else branches[1:]
        for branch in branches:
            self.visit(branch)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.bases = self.bases, [name for base in node.bases if (name := self.dotted(base))]
        self.generic_visit(node)
        self.bases = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self.names)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            self.names.pop(argument.arg, None)
            if kind := self.annotated(argument.annotation):
                self.names[argument.arg] = kind + "()"
        if self.bases:
            self.names["self"] = self.bases[0] + "()"
        self.generic_visit(node)
        new = {name: kind for name, kind in self.names.items() if not kind.endswith("()")}
        self.names = new | outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.names.pop(target.id, None)
                if isinstance(node.value, ast.Call) and (made := self.dotted(node.value)):
                    self.names[target.id] = made

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
        target = self.dotted(node.func)
        if keywords and target and target.partition(".")[0] in LIBRARIES:
            target = target if target in ELSEWHERE else target.replace("()", "")
            self.calls.append(Call(f"{self.file}:{node.lineno}", ELSEWHERE.get(target, target), keywords))

    def annotated(self, annotation: ast.expr | None) -> str | None:
        """The first library class in an annotation such as `PreTrainedModel | PeftModel`."""
        for part in ast.walk(annotation) if annotation else []:
            name = self.dotted(part) if isinstance(part, (ast.Name, ast.Attribute)) else None
            if name and name.partition(".")[0] in LIBRARIES:
                return name
        return None

    def dotted(self, node: ast.expr) -> str | None:
        """`bnb.nn.Linear4bit` -> "bitsandbytes.nn.Linear4bit"; None for what no import explains."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = node.value
            if isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "super" and self.bases:
                return f"{self.bases[0]}.{node.attr}"
            before = self.dotted(owner)
            known = before and "()." not in before  # what an object's attribute is, nothing says
            return f"{before}.{node.attr}" if known else None
        if isinstance(node, ast.Call) and (made := self.dotted(node.func)):  # what a call returns
            is_class = made.rpartition(".")[2][:1].isupper()
            return RETURNS.get(made, made) + "()" if made in RETURNS or is_class else None
        return None


def sources(root: Path) -> dict[str, str]:
    """Name -> Python source of all that is ours: modules, notebooks, and the code that the kit writes for its users."""
    found = {}
    for folder in ("helpers", "tools", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            found[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
    for path in [*course.lessons(root), *course.solutions(root), *course.worksheets(root)]:
        cells = course.code_cells(course.read(path))
        found[path.relative_to(root).as_posix()] = "\n".join(cell.source for cell in cells)
    return found | {"copy as code": copied_code()}


def copied_code() -> str:
    from helpers.config import TrainConfig
    from helpers.hardware import KNOWN_GPUS
    from helpers.panel.code import as_code
    from helpers.planner import make_plan

    config = TrainConfig(model="Qwen2.5-1.5B-Instruct")
    return as_code(config, make_plan(config, KNOWN_GPUS["T4"], exact=False), training_examples=1000)


def calls_in(name: str, source: str) -> list[Call]:
    finder = Finder(name)
    finder.visit(ast.parse(source))
    return finder.calls


def find(dotted: str) -> object:
    """The object behind a dotted name. AttributeError: this version does not have it."""
    try:
        return pkgutil.resolve_name(dotted)
    except ImportError as error:
        raise AttributeError(dotted) from error


def missing(call: Call) -> list[str]:
    """The call's keywords that the function neither names nor reads from its **kwargs."""
    function = find(call.target)
    parameters = inspect.signature(function).parameters
    unknown = [keyword for keyword in call.keywords if keyword not in parameters]
    if call.target in FREE:
        return []
    if not unknown or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return unknown
    text = "".join(inspect.getsource(inspect.unwrap(source)) for source in handed_on(call.target, function))
    return [name for name in unknown if not any(form in text for form in (f'"{name}"', f"{name}:", f"{name}="))]


def handed_on(target: str, function: object) -> list[object]:
    """The functions that may read the keywords: this one, those of the same name in base classes, and those named in READ_IN."""
    owner, _, name = target.rpartition(".")
    found, kind = [function], find(owner)
    if inspect.isclass(kind):
        found += [vars(base)[name] for base in kind.__mro__ if name in vars(base)]
        for key, readers in READ_IN.items():
            known, _, method = key.rpartition(".")
            if method == name and find(known) in kind.__mro__:
                found += [find(reader) for reader in readers if exists(reader)]
    elif inspect.isclass(function):
        found.append(function.__init__)
    return [getattr(item, "__func__", item) for item in found]


def exists(dotted: str) -> bool:
    try:
        find(dotted)
    except AttributeError:
        return False
    return True


def test_every_keyword_exists_in_these_versions(root, say):
    calls = [call for name, source in sources(root).items() for call in calls_in(name, source)]
    wrong = []
    for call in calls:
        try:
            wrong += [f"{call.place}: {call.target} has no {keyword}" for keyword in missing(call)]
        except AttributeError as error:
            wrong.append(f"{call.place}: {call.target} is not there ({error})")
    keywords, functions = sum(len(call.keywords) for call in calls), {call.target for call in calls}
    say(f"{keywords} keywords in {len(calls)} calls of {len(functions)} functions")
    assert not wrong, "\n".join(wrong)
    usual = "SFTConfig LoraConfig BitsAndBytesConfig from_pretrained generate apply_chat_template snapshot_download"
    assert {target.rpartition(".")[2] for target in functions} >= set(usual.split())


@pytest.mark.parametrize(
    ("imports", "code", "wrong"),
    [
        ("from trl import SFTConfig", "SFTConfig(max_length=1, max_seq_length=2)", "max_seq_length"),
        ("import peft as p", "def f():\n    p.LoraConfig(r=1, rank=2)", "rank"),
        ("from transformers import AutoModelForCausalLM as A", "A.from_pretrained('x', dtype=1, dtypes=2)", "dtypes"),
        ("from transformers import PreTrainedModel as M", "def f(m: M | None):\n    m.generate(max_new=1)", "max_new"),
        ("from trl import SFTTrainer as S", "class T(S):\n    def f(self):\n        self.train(resume=1)", "resume"),
        ("from datasets import Dataset", "a = Dataset.from_list([])\na.map(print, batches=True)", "batches"),
    ],
)
def test_a_keyword_that_does_not_exist_is_found(imports, code, wrong):
    calls = calls_in("x.py", f"{imports}\n{code}")
    assert [keyword for call in calls for keyword in missing(call)] == [wrong]


def test_a_call_that_the_code_makes_only_where_it_exists_is_not_asked_for_elsewhere():
    code = """import trl
x = trl.Missing(a=1) if hasattr(trl, 'Missing') else trl.SFTConfig(b=2)
y = trl.SFTConfig(c=1) if hasattr(trl, 'SFTConfig') else 0"""
    assert [call.keywords for call in calls_in("x.py", code)] == [["b"], ["c"]]


def test_what_is_not_a_librarys_is_left_alone():
    code = "def f(model):\n    model.generate(anything=1)\nprint(sep='')\nimport os\nos.walk('.', topdown=True)"
    assert calls_in("x.py", code) == []
