"""Child process: load and use an untrusted tokenizer within time and memory limits.

Reads {"path", "seconds", "megabytes", "texts", "sys_path"} as JSON, writes {"problem": sentence or null}. A bomb ends this
process only.
"""

from __future__ import annotations

import json
import os
import resource
import string
import sys
from pathlib import Path
from typing import Any

GROWTH, SPARE = 64, 1000
"""A text of n characters may give GROWTH · n + SPARE tokens or characters."""
STRESS = ["a" * 4000, " " * 4000, "1" * 4000, "\n" * 2000, "x1! " * 1000, "é数🙂" * 500, string.printable * 20]
"""Texts on which a slow regular expression or a replacement that grows shows."""


def problem_of(tokenizer: Any, texts: list[str]) -> str | None:
    """What is wrong with a tokenizer in use; None if it is usable or fails with an ordinary exception."""
    for text in [*texts, *STRESS]:
        most = GROWTH * len(text) + SPARE
        for added in (True, False):
            encoded = tokenizer.encode(text, add_special_tokens=added)
            ids = encoded if isinstance(encoded, list) else encoded.ids
            if len(ids) > most:
                return f"gives {len(ids)} tokens for a text of {len(text)} characters"
        if len(tokenizer.decode(ids)) > most:
            return f"decodes the {len(ids)} tokens of a text of {len(text)} characters to a text of more than {most}"
    return None


def opened(path: Path) -> Any:
    """The tokenizer of a tokenizer.json by the library alone, which is fast; of other files as transformers converts them."""
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()  # as transformers uses it
        tokenizer.no_truncation()
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, local_files_only=True)


def main() -> None:
    setup = json.load(sys.stdin)
    sys.path[:] = setup["sys_path"]
    path = Path(setup["path"])
    if path.suffix == ".json":
        import tokenizers  # noqa: F401  (before the limits: what the packages take themselves is not the file's)
    else:
        import transformers  # noqa: F401
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + (setup["megabytes"] << 20)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    used = int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + setup["seconds"], used + setup["seconds"] + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    problem = None
    try:
        problem = problem_of(opened(path), setup["texts"])
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, MemoryError):
            raise
    except BaseException:  # a panic of native code
        problem = "makes the tokenizers library fail"
    json.dump({"problem": problem}, sys.stdout)


if __name__ == "__main__":
    main()
