"""Read tokenizers and stop ids; refuse pairs of models whose tokens differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import AutoTokenizer

from headwater.errors import UserError

PROBES = (
    "17+45+82+03", "=62;", "Hello, world!\n", " The answer is \\boxed{\\frac{3}{4}}.", "αβγ – naïve 数学 🙂", "def f(x):\n    return x",
    "<think>\n\n</think>\n\n", "<|im_start|>user\n1 + 1?<|im_end|>\n", "1234567890", "  two  spaces\t tab",
)  # fmt: skip
"""Texts that student and teacher must tokenize alike: an equal vocabulary size is not enough."""


def read_tokenizer(path: str, trust_remote_code: bool, config: Any = None) -> Any:
    """Raises ValueError if there is none: for some architectures transformers then makes an empty one.

    config  the transformers config in the same folder, which is read if it is not given
    """
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, config=config)
    tokenizer.init_kwargs.pop("local_files_only", None)  # a setting of this process that would be saved with the model
    if getattr(tokenizer, "unk_token", None) == "":  # in no vocabulary: transformers looks up its id without end
        tokenizer.unk_token = None
    # Some broken tokenizers fail only when used.
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("1", *PROBES)]
    if not ids[0]:
        raise ValueError("its tokenizer gives no ids for the text '1'; are the tokenizer's files there?")
    return tokenizer


def reads_alike(tokenizer: Any, again: Any) -> bool:
    """Whether two tokenizers give the same ids, special tokens and prompts."""
    kept = ("eos_token_id", "pad_token_id", "bos_token_id", "chat_template", "all_special_ids")
    return all(getattr(tokenizer, name, None) == getattr(again, name, None) for name in kept) and all(
        tokenizer(text)["input_ids"] == again(text)["input_ids"] for text in PROBES
    )


def stop_ids_of(generation_config: Any, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the union of generation config, model config and tokenizer."""
    ids: set[int] = set()
    for source in (generation_config, config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return tuple(sorted(ids))


def refuse_different_tokens(student: Any, teacher: Any, fields: tuple[str, str], texts: Sequence[str] = ()) -> None:
    """Refuse a pair of tokenizers that give different ids for the same text.

    Distillation compares distributions token by token; with different ids it would silently train on noise.
    Raises UserError that names the first text on which they differ.
    """
    for text in (*PROBES, *texts):
        student_ids, teacher_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)
        )
        if student_ids != teacher_ids:
            raise UserError(
                f"{fields[0]} and {fields[1]}: their tokenizers give different ids for the same text {text!r:.60} "
                f"({student_ids[:6]} and {teacher_ids[:6]}), so the teacher cannot supervise the student token by token"
            )


class HasVocabulary(Protocol):
    @property
    def vocabulary(self) -> int: ...


def refuse_different_widths(student: HasVocabulary, teacher: HasVocabulary, fields: tuple[str, str]) -> None:
    """Refuse a pair of models whose output layers differ in width. Raises UserError."""
    if student.vocabulary != teacher.vocabulary:
        raise UserError(
            f"{fields[0]} and {fields[1]}: their output layers have {student.vocabulary} and {teacher.vocabulary} columns; "
            "resize one (resize_token_embeddings) so that both have the same"
        )
