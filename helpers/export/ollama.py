"""Ollama's Modelfile: the tokenizer's chat template in Ollama's words.

Nothing is known here about families of models. A few conversations of stand-in texts are rendered with the chat template, and what
it writes before, between and after them is read off.
"""

from __future__ import annotations

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from helpers.files import ExportError
from helpers.hub import limited_template

SYSTEM, USER, ANSWER, NEXT = "SYSTEM-TEXT", "USER-TEXT", "ANSWER-TEXT", "NEXT-TEXT"
ROLES = {SYSTEM: "system", USER: "user", ANSWER: "assistant", NEXT: "user"}


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf_name: str) -> str:
    """Ollama's Modelfile for a GGUF file beside it.

    Raises:
        ExportError: the tokenizer has no chat template, or one that treats turns unlike each other.
    """
    if not tokenizer.chat_template:
        raise ExportError("This tokenizer has no chat template, which Ollama needs: export an Instruct model.")
    before_user, before_answer = _render(tokenizer, USER, ask=True).split(USER)
    after_answer = _render(tokenizer, USER, ANSWER).split(ANSWER)[1]
    # What stands before an answer is read where one is asked for, which is what the model was trained to go on from. Some templates
    # put a space or an empty thought before answers that were already given; Ollama's template cannot tell the two apart.
    between = _render(tokenizer, USER, ANSWER, NEXT, ask=True).split(ANSWER)[1].split(NEXT)[0]
    if not between.startswith(after_answer):
        raise ExportError(
            "This chat template writes a later turn unlike the first, which Ollama's template cannot say: use llama.cpp "
            "with --jinja, which reads the original from the GGUF file."
        )
    before_next, system, default = between.removeprefix(after_answer), "", ""
    try:
        with_system = _render(tokenizer, SYSTEM, USER, ask=True)
    except TemplateError:  # no system messages, as in Gemma
        with_system = ""
    if SYSTEM in with_system and with_system.split(USER)[0].endswith(before_next):
        before_system, after_system = with_system.split(USER)[0].removesuffix(before_next).split(SYSTEM)
        if after_system:
            system = f"{{{{ if .System }}}}{before_system}{{{{ .System }}}}{after_system}{{{{ end }}}}"
        # What the template says if nobody gives a system message.
        default = before_user.removesuffix(before_next).removeprefix(before_system).removesuffix(after_system)
        before_user = before_next
    template = f"{system}{before_user}{{{{ .Prompt }}}}{before_answer}{{{{ .Response }}}}{after_answer}"
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    lines += [f'SYSTEM """{default}"""'] if default else []
    lines += [f'PARAMETER stop "{after_answer.strip()}"'] if after_answer.strip() else []
    return "\n".join(lines) + "\n"


@limited_template()
def _render(tokenizer: PreTrainedTokenizerBase, *texts: str, ask: bool = False) -> str:
    """A conversation as text, without the first token if the tokenizer adds it: llama.cpp does that by itself, and twice is too often."""
    messages = [{"role": ROLES[text], "content": text} for text in texts]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    adds = tokenizer.bos_token and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return rendered.removeprefix(tokenizer.bos_token) if adds else rendered
