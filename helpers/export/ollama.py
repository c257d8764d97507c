"""The Modelfile that tells Ollama how to talk to the model: its chat template, rewritten in Ollama's words.

Nothing about a family of models is known here: a few conversations are rendered with the tokenizer's own template, and what stands
before, between and after their texts is the template.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from helpers.files import ExportError

SYSTEM, USER, ANSWER, NEXT = (
    "SYSTEM-TEXT",
    "USER-TEXT",
    "ANSWER-TEXT",
    "NEXT-TEXT",
)  # stand-ins that no template contains


@dataclass(frozen=True)
class Turns:
    """The texts around the parts of a conversation. `default_system` is what the template says if nobody gives a system message."""

    before_system: str
    after_system: str
    before_user: str
    before_answer: str
    after_answer: str
    default_system: str = ""


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf_name: str) -> str:
    """Ollama's Modelfile for a GGUF file beside it.

    Raises:
        ExportError: the tokenizer has no chat template, or one that treats turns unlike each other.
    """
    turns = read_turns(tokenizer)
    system = (
        f"{{{{ if .System }}}}{turns.before_system}{{{{ .System }}}}{turns.after_system}{{{{ end }}}}"
        if turns.after_system
        else ""
    )
    template = (
        f"{system}{turns.before_user}{{{{ .Prompt }}}}{turns.before_answer}{{{{ .Response }}}}{turns.after_answer}"
    )
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    if turns.default_system:
        lines.append(f'SYSTEM """{turns.default_system}"""')
    if turns.after_answer.strip():
        lines.append(f'PARAMETER stop "{turns.after_answer.strip()}"')
    return "\n".join(lines) + "\n"


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """What the chat template writes around each part, found by rendering."""
    if not tokenizer.chat_template:
        raise ExportError(
            "This tokenizer has no chat template, so Ollama cannot be told how to talk to the model: export an Instruct model."
        )

    def render(*texts: str, ask: bool = False) -> str:
        roles = {SYSTEM: "system", USER: "user", ANSWER: "assistant", NEXT: "user"}
        messages = [{"role": roles[text], "content": text} for text in texts]
        return _without_bos(
            tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        )

    asked = render(USER, ask=True)
    answered = render(USER, ANSWER)
    head, before_answer = asked.split(USER)
    after_answer = answered.split(ANSWER)[1]
    # What stands before an answer is read where one is asked for, which is what the model was trained to go on from. Some templates
    # put a space or an empty thought before answers that were already given; Ollama's template cannot tell the two apart.
    between = render(USER, ANSWER, NEXT, ask=True).split(ANSWER)[1].split(NEXT)[0]
    if not between.startswith(after_answer):
        raise ExportError(
            "This chat template writes a later turn unlike the first, which Ollama's template cannot say: use llama.cpp "
            "with --jinja, which reads the original from the GGUF file."
        )
    before_user = between[len(after_answer) :]
    try:
        with_system = render(SYSTEM, USER, ask=True)
    except TemplateError:  # no system messages, as in Gemma
        with_system = ""
    if SYSTEM not in with_system or not with_system.split(SYSTEM)[1].split(USER)[0].endswith(before_user):
        return Turns("", "", head, before_answer, after_answer)
    before_system, rest = with_system.split(SYSTEM)
    after_system = rest.split(USER)[0].removesuffix(before_user)
    default = head.removesuffix(before_user).removeprefix(before_system).removesuffix(after_system)
    return Turns(before_system, after_system, before_user, before_answer, after_answer, default)


def _without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """llama.cpp adds the first token by itself where the tokenizer does; twice would be one too many."""
    adds = bool(tokenizer.bos_token) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds else text
