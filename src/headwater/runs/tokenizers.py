"""The tokenizers of a run's models, as bytes of tokens."""

from __future__ import annotations

from headwater.models.token_bytes import TokenBytes, TokenPair, same_tokens
from headwater.runs.inputs import RunInputs
from headwater.runs.read_once import InputError
from headwater.teachers.server_client import is_served


def token_bytes(inputs: RunInputs, role: str) -> TokenBytes:
    """The bytes of each token of a role's tokenizer, and its end. Raises InputError for a server whose tokenizer is not here."""
    field, name = inputs.field_and_name(role)
    if not is_served(name):
        return TokenBytes.of(inputs.tokenizer(role), inputs.stop_ids(role))
    folder = inputs.served_tokenizer
    if folder is None:
        raise InputError(
            "tokenizer",
            f"{field}: is a server ({name}), and tokenizers are aligned by the bytes of each token; name a folder with its tokenizer "
            "as models.teacher_tokenizer",
        )
    return TokenBytes.of(folder.tokenizer, folder.stop_ids)


def token_pair(inputs: RunInputs, learner: str, teacher: str) -> TokenPair | None:
    """The tokenizers of a learner and its teacher; None where they are the same."""
    own, other = token_bytes(inputs, learner), token_bytes(inputs, teacher)
    return None if same_tokens(own, other) else TokenPair(own, other)
