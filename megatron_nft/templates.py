"""How questions become prompts, by the names that recipes choose them by."""

from dataclasses import dataclass

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class PromptTemplate:
    """How a question becomes a prompt; a chat is laid out by the tokenizer's own chat template."""

    chat: bool = False
    system: str = ""
    suffix: str = ""  # follows the question

    def messages(self, question: str | list[Message]) -> list[Message] | None:
        """The chat to lay out, or None where the prompt is plain text."""
        if isinstance(question, list):  # brings its own instruction
            return None if self == TEMPLATES["raw"] else question
        if not self.chat:
            return None
        user = {"role": "user", "content": question + self.suffix}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]

    def plain(self, question: str | list[Message]) -> str:
        parts = [question] if isinstance(question, str) else [m["content"] for m in question]
        return "\n\n".join(parts) + self.suffix


TEMPLATES: dict[str, PromptTemplate] = {
    "raw": PromptTemplate(),
    "boxed": PromptTemplate(suffix=f"\n{INSTRUCTION}\n"),
    "chat": PromptTemplate(chat=True, suffix=f"\n{INSTRUCTION}"),
    "qwen-math": PromptTemplate(chat=True, system=INSTRUCTION),
}


def template_of(name: str) -> PromptTemplate:
    """Raises ValueError where there is none of that name."""
    if name not in TEMPLATES:
        raise ValueError(f"data.template was {name!r}; it may be {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
