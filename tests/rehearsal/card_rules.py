"""What breaks in a notebook's cell on a CUDA card and not on a CPU, as rules that read the code. Needs no torch.

complaints(cells)      # the sources of one notebook's code cells, in order -> sentences, empty where nothing is wrong
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

Env = dict[str, str]
# A module on the card; a tensor that lies there; a tensor that was made on the CPU.
MODEL, CARD, HOST = "model", "card", "host"

MODEL_MAKERS = {"load_quantized", "attach_lora", "get_peft_model", "load_adapter", "plain_model"}
MODEL_CLASSES = {"AutoModelForCausalLM", "PeftModel"}
FACTORIES = {"tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "linspace", "eye"}
PARTS = {
    "items",
    "values",
    "keys",
    "named_modules",
    "modules",
    "children",
    "get_submodule",
    "get_base_model",
    "train",
    "eval",
    "merge_and_unload",
}
TENSORS_OF_A_MODEL = {"parameters", "named_parameters", "buffers", "state_dict"}
PLAIN_ATTRIBUTES = {"shape", "dtype", "device", "nbytes", "quant_state", "compute_dtype", "in_features", "out_features"}
TO_PYTHON = {
    "item",
    "tolist",
    "numel",
    "element_size",
    "size",
    "dim",
    "get_memory_footprint",
    "get_nb_trainable_parameters",
    "decode",
}
TENSOR_LIBRARIES = ("torch", "bitsandbytes")
CLOCKS = {"perf_counter", "monotonic"}
VIEWS = {"detach", "flatten", "reshape", "view", "squeeze", "unsqueeze"}  # the same memory under another name


def complaints(cells: list[str]) -> list[str]:
    trees = [ast.parse(source) for source in cells]
    where = Where()
    found = [words for tree in trees for words in where.look_at(tree)]
    for tree in trees:
        for scope in scopes(tree):
            found += [*numbers_for_numpy(scope), *bare_backward(scope), *clocks(scope)]
    return [*found, *kept_names(trees)]


def scopes(tree: ast.AST) -> Iterator[ast.AST]:
    """The cell without its functions, and each function."""
    yield ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def called(node: ast.Call) -> str:
    """The last name of what is called: `c` of `a.b.c(...)`."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def chain(node: ast.AST) -> list[str]:
    """Names of an expression from outside in: `a.b(1).c` -> c, b, a. Subscripts are gone through."""
    names = []
    while True:
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        else:
            return [*names, node.id] if isinstance(node, ast.Name) else names


# ------------------------------------------------------------------------------------------------------ which device


class Where:
    """Follows a notebook's names and knows which are models, tensors on the card and tensors on the CPU, as far as the code shows it."""

    def __init__(self) -> None:
        self.env: Env = {}
        self.functions: dict[str, ast.FunctionDef] = {}
        self.of_tensors: set[str] = set()  # functions and modules whose arguments must lie on one device
        self.found: list[str] = []

    def look_at(self, tree: ast.Module) -> list[str]:
        self.found = []
        self.block(tree.body, self.env)
        return self.found

    def block(self, body: list[ast.stmt], env: Env) -> str | None:
        """Runs statements in order; the kind of what is returned."""
        returned = None
        for node in body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                library = (getattr(node, "module", None) or node.names[0].name).partition(".")[0]
                if library in TENSOR_LIBRARIES:
                    self.of_tensors |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
                self.call(node, [MODEL if env.get(argument.arg) == MODEL else None for argument in node.args.args], env)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                kind = self.kind(node.value, env) if node.value else None
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.bind(target, kind, env, node.value)
            elif isinstance(node, ast.Return):
                returned = self.kind(node.value, env) if node.value else None
            elif isinstance(node, ast.For):
                self.bind(node.target, self.kind(node.iter, env), env)
                self.block(node.body, env)
            elif isinstance(node, (ast.If, ast.While)):
                self.kind(node.test, env)
                self.block([*node.body, *node.orelse], env)
            elif isinstance(node, ast.With):
                for item in node.items:
                    kind = self.kind(item.context_expr, env)
                    if item.optional_vars is not None:
                        self.bind(item.optional_vars, kind, env)
                returned = self.block(node.body, env) or returned
            else:
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        self.kind(child, env)
        return returned

    def bind(self, target: ast.expr, kind: str | None, env: Env, value: ast.expr | None = None) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = kind
        elif isinstance(target, (ast.Tuple, ast.List)):
            if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
                for one, part in zip(target.elts, value.elts):
                    self.bind(one, self.kind(part, env), env, part)
            elif isinstance(value, ast.Call) and called(value) == "load_quantized":
                self.bind(target.elts[0], MODEL, env)  # the other one is the tokenizer
            else:
                for one in target.elts:
                    self.bind(one, kind, env)

    def call(self, function: ast.FunctionDef, kinds: list[str | None], env: Env) -> str | None:
        inner = env | dict(zip([argument.arg for argument in function.args.args], kinds))
        return self.block(function.body, inner)

    def together(self, node: ast.AST, kinds: list[str | None], must_agree: bool = True) -> str | None:
        if must_agree and HOST in kinds and (CARD in kinds or MODEL in kinds):
            self.found.append(f"a tensor made on the CPU meets one of the model: {ast.unparse(node)}")
        return CARD if CARD in kinds or MODEL in kinds else HOST if HOST in kinds else None

    def kind(self, node: ast.expr | None, env: Env) -> str | None:
        if isinstance(node, ast.Name):
            return env.get(node.id)
        if isinstance(node, ast.Attribute):
            inner = self.kind(node.value, env)
            if node.attr == "model" and isinstance(node.value, ast.Name):
                return MODEL  # run.model
            if node.attr in PLAIN_ATTRIBUTES or inner is None:
                return None
            return CARD if inner == MODEL and node.attr in {"weight", "data", "grad", "logits", "loss"} else inner
        if isinstance(node, ast.Subscript):
            self.kind(node.slice, env)
            return self.kind(node.value, env)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            inner = dict(env)
            for part in node.generators:
                self.bind(part.target, self.kind(part.iter, inner), inner)
            if isinstance(node, ast.DictComp):
                return self.kind(node.value, inner)
            return self.kind(node.elt, inner)
        if isinstance(node, ast.Lambda):
            return self.kind(node.body, env | {argument.arg: None for argument in node.args.args})
        if isinstance(node, (ast.BinOp, ast.Compare)):
            parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.left, *node.comparators]
            kinds = [self.kind(part, env) for part in parts]
            plain = isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.In, ast.NotIn))
            return self.together(node, kinds, must_agree=not plain)
        if isinstance(node, ast.Call):
            return self.called(node, env)
        if isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.BoolOp, ast.UnaryOp, ast.IfExp, ast.Starred, ast.Dict)):
            return self.together(
                node,
                [self.kind(child, env) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)],
                False,
            )
        if node is not None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.kind(child, env)
        return None

    def called(self, node: ast.Call, env: Env) -> str | None:
        name, function = called(node), node.func
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        kinds = [self.kind(part, env) for part in [*node.args, *keywords.values()]]
        owner = self.kind(function.value, env) if isinstance(function, ast.Attribute) else None
        names = chain(function)
        if (
            any(
                isinstance(part, ast.Constant) and str(part.value).startswith("cuda")
                for part in [*node.args, *keywords.values()]
            )
            or name == "cuda"
        ):
            self.found.append(f"a device by its name, which not every reader has: {ast.unparse(node)}")
        if "generator" in keywords and "device" in keywords and "Generator()" in ast.unparse(keywords["generator"]):
            self.found.append(f"a generator of the CPU for a tensor that may lie elsewhere: {ast.unparse(node)}")
        if names[-1:] == ["torch"] and name in FACTORIES:
            return CARD if "device" in keywords else HOST
        if name in MODEL_MAKERS or (name == "from_pretrained" and names[-1] in MODEL_CLASSES):
            return MODEL
        if name == "apply_chat_template":
            return HOST if "return_tensors" in keywords or None in keywords else None
        if name == "cpu":
            return HOST
        if name == "to" and isinstance(function, ast.Attribute):
            to_device = any(
                word in ast.unparse(part) for part in [*node.args, *keywords.values()] for word in ("device", ".kind")
            )
            return (owner if owner == MODEL else CARD) if to_device else owner
        if name in TO_PYTHON:
            return None
        if names[-1:] == ["np"] or names[-1:] == ["pd"]:
            if CARD in kinds:
                self.found.append(f"numpy and pandas cannot read a card's memory: {ast.unparse(node)}")
            return None
        if isinstance(function, ast.Name):
            if env.get(function.id) == MODEL:
                return self.together(node, [CARD, *kinds])
            if function.id in self.functions:
                return self.call(self.functions[function.id], kinds, env)
            if function.id in {
                "next",
                "iter",
                "list",
                "tuple",
                "sorted",
                "zip",
                "enumerate",
                "sum",
                "max",
                "min",
                "abs",
            }:
                return MODEL if MODEL in kinds else self.together(node, kinds, must_agree=False)
            return self.together(node, kinds) if function.id in self.of_tensors else None
        if owner == MODEL:
            return (
                MODEL if name in PARTS else CARD if name in TENSORS_OF_A_MODEL else self.together(node, [CARD, *kinds])
            )
        if names[-1:] and names[-1] in self.of_tensors and owner is None:
            return self.together(node, kinds)
        return self.together(node, [owner, *kinds]) if owner else None


# ------------------------------------------------------------------------------------------------------ other rules


def numbers_for_numpy(scope: ast.AST) -> Iterator[str]:
    """numpy reads neither a card's memory nor bf16."""
    assigned = {
        target.id: node.value
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(scope):
        if isinstance(node, ast.Call) and called(node) == "numpy":
            names = chain(node)
            names += chain(assigned[names[-1]]) if names[-1:] and names[-1] in assigned else []
            if not {"float", "cpu"} <= set(names):
                yield f"numpy needs .float().cpu() first: {ast.unparse(node)}"


def bare_backward(scope: ast.AST) -> Iterator[str]:
    """A lesson's own loop calculates as training does, with the loss scaled in fp16. Functions that are given a model are somebody else's."""
    if (
        isinstance(scope, ast.FunctionDef)
        and any(argument.arg == "model" for argument in scope.args.args)
        and scope.name != "short_training"
    ):
        return
    scales = (
        {"scale"}
        if any(isinstance(node, ast.With) and "autocast" in ast.unparse(node.items[0]) for node in ast.walk(scope))
        else set()
    )
    scales |= {
        item.optional_vars.id
        for node in ast.walk(scope)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.context_expr, ast.Call)
        and called(item.context_expr) == "mixed_precision"
        and item.optional_vars
    }
    for node in ast.walk(scope):
        if isinstance(node, ast.Call) and called(node) == "backward" and isinstance(node.func, ast.Attribute):
            loss = node.func.value
            if not (
                isinstance(loss, ast.BinOp)
                and isinstance(loss.op, ast.Mult)
                and isinstance(loss.left, ast.Name)
                and loss.left.id in scales
            ):
                yield f"fp16 loses small gradients without a scaled loss: {ast.unparse(node)}"


def clocks(scope: ast.AST) -> Iterator[str]:
    """A card goes on working when Python has gone ahead, so a clock must wait for it (`Cost` does)."""
    calls = {called(node) for node in ast.walk(scope) if isinstance(node, ast.Call)}
    if calls & CLOCKS and "synchronize" not in calls:
        yield f"a clock that does not wait for the card: {ast.unparse(scope)[:120]}"


def kept_names(trees: list[ast.Module]) -> Iterator[str]:
    """A model that is let go must not live on under another name: a layer, a view of a weight, an optimizer's averages."""
    holds: dict[str, str] = {}  # name -> what it keeps alive: "model 1", "optimizer"
    models = 0
    for tree in trees:
        for node in statements(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    models += assign(target, node.value, holds, models)
            elif isinstance(node, ast.For):
                assign(node.target, node.iter, holds, models, iterated=True)
            elif isinstance(node, ast.Delete):
                gone = {target.id for target in node.targets if isinstance(target, ast.Name)}
                roots = {holds.pop(name) for name in gone if name in holds}
                for name, root in holds.items():
                    if root in roots and root.startswith("model"):
                        yield f"{name} keeps a part of what is deleted: {ast.unparse(node)}"
            elif (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Call)
                and called(node.value) == "release_last_model"
            ):
                for name in [name for name, root in holds.items() if root == "optimizer"]:
                    yield f"{name} keeps an optimizer's averages when the model is released"


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """All statements of a cell in order, also those inside of others, without functions."""
    for node in tree.body:
        yield node
        if not isinstance(node, ast.FunctionDef) and hasattr(node, "body"):
            yield from statements(node)


def assign(target: ast.expr, value: ast.expr, holds: dict[str, str], models: int, iterated: bool = False) -> int:
    """Notes what the assigned names keep alive; the number of new models."""
    if isinstance(target, (ast.Tuple, ast.List)):
        if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts) and not iterated:
            return sum(assign(one, part, holds, models) for one, part in zip(target.elts, value.elts))
        chosen = (
            target.elts[:1]
            if isinstance(value, ast.Call) and called(value) == "load_quantized"
            else without_keys(target, value)
        )
        return sum(assign(one, value, holds, models, iterated) for one in chosen)
    if not isinstance(target, ast.Name):
        return 0
    if isinstance(value, ast.Call) and (
        called(value) == "load_quantized" or (called(value) == "from_pretrained" and chain(value)[-1] in MODEL_CLASSES)
    ):
        holds[target.id] = f"model {models + 1}"
        return 1
    kept = keeps(value, holds)
    if kept:
        holds[target.id] = kept
    else:
        holds.pop(target.id, None)
    return 0


def without_keys(target: ast.expr, value: ast.expr) -> list[ast.expr]:
    """The targets of a loop over `value`; of pairs, those behind the name or number that each begins with."""
    targets = list(target.elts) if isinstance(target, (ast.Tuple, ast.List)) else [target]
    pairs = any(
        isinstance(node, ast.Call) and called(node) in {"items", "named_modules", "named_parameters", "enumerate"}
        for node in ast.walk(value)
    )
    return targets[1:] if pairs and len(targets) > 1 else targets


def keeps(value: ast.expr, holds: dict[str, str]) -> str | None:
    """What the value of an expression keeps alive."""
    if isinstance(value, (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)):
        inner = dict(holds)
        for part in value.generators:
            for one in without_keys(part.target, part.iter):
                inner[getattr(one, "id", "")] = keeps(part.iter, inner) or ""
        return keeps(value.value if isinstance(value, ast.DictComp) else value.elt, inner) or None
    if isinstance(value, (ast.Tuple, ast.List, ast.Set)):
        found = [keeps(part, holds) for part in value.elts]
        return next((one for one in found if one), None)
    names = chain(value)
    if isinstance(value, ast.Call):
        inside = [keeps(part, holds) for part in value.args]
        if "optim" in names or names[-1:] == ["optimizer_type"]:
            return "optimizer" if any(inside) else None
        if called(value) in {"next", "iter", "list", "tuple", "attach_lora", "get_peft_model"}:
            return next((one for one in inside if one), None)
    node = value
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Call):
            node = node.func
            if not isinstance(node, ast.Attribute) or node.attr not in VIEWS | PARTS | TENSORS_OF_A_MODEL:
                return None  # a result of its own
        if isinstance(node, ast.Attribute) and node.attr in PLAIN_ATTRIBUTES:
            return None
        node = node.value
    return holds.get(node.id) if isinstance(node, ast.Name) else None if node is value else keeps(node, holds)
