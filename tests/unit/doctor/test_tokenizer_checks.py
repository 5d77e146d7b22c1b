"""Checks of pairs of models with different tokenizers: planted pairs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers

from headwater.config.builtin import find_recipe
from headwater.doctor.checks import CHECKS, Examination, examine
from headwater.doctor.context import DoctorContext
from headwater.runs.inputs import RunInputs
from runs import TINY
from tools.pretrain.common import wrap_tokenizer
from tools.pretrain.pocket import make_tokenizer

POCKET = Path(str(files("headwater"))) / "pocket"
ALIGNED = ("stages.warmup.dense.tokenizers=prefix", "stages.opd.dense.tokenizers=prefix")


def teacher_with(folder: Path, tokenizer: object) -> str:
    shutil.copytree(POCKET / "qwen3-teacher", folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return f"models.teacher={folder}"


def examined(tmp_path: Path, *changes: str, arms: Sequence[str] = ("raw_teacher",)) -> Examination:
    with RunInputs(find_recipe("pocket", [*TINY, *changes]), need_answers=False) as inputs:
        context = DoctorContext(inputs, tuple(arms), (0,), tmp_path / "out")
        return examine(
            context,
            [
                check
                for check in CHECKS
                if check.title in ("aligned tokenizers", "token ids of probe strings and problems")
            ],
        )


def names(result: Examination) -> dict[str, str]:
    return {finding.name: finding.severity for finding in result.findings}


def test_good_pair_is_noted_with_figures(tmp_path: Path) -> None:
    teacher = teacher_with(tmp_path / "pairs", make_tokenizer("pairs"))
    result = examined(tmp_path, teacher, *ALIGNED)
    assert names(result) == {"tokenizers-aligned": "note"}
    assert "100.0% of the tokens of 32 texts are aligned" in result.findings[0].evidence
    refused = examined(tmp_path, teacher)
    assert names(refused) == {"token-ids-differ": "error"}
    assert "stages.warmup.dense.tokenizers=prefix and stages.opd.dense.tokenizers=prefix" in refused.findings[0].remedy
    half = examined(tmp_path, teacher, ALIGNED[1])
    assert half.findings[0].evidence.endswith(
        "in warmup; stages.warmup.dense.tokenizers=prefix would align the two (docs/teachers.md)"
    )


def test_shared_tokens_of_unlike_divisions_are_warned_about(tmp_path: Path) -> None:
    shared = [change.replace("prefix", "shared") for change in ALIGNED]
    result = examined(tmp_path, teacher_with(tmp_path / "pairs", make_tokenizer("pairs")), *shared)
    assert names(result) == {"tokenizers-aligned": "note", "shared-tokens-mislead": "warning"}


def test_one_tokenizer_needs_no_alignment(tmp_path: Path) -> None:
    assert names(examined(tmp_path, *ALIGNED)) == {"tokenizers-equal": "note"}


def test_pair_with_lost_texts_is_warned_about(tmp_path: Path) -> None:
    """The teacher knows no plus sign: every text ends before its first one."""
    vocabulary = {**{token: index for token, index in make_tokenizer().get_vocab().items() if token != "+"}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    backend.decoder = decoders.Fuse()
    result = examined(tmp_path, teacher_with(tmp_path / "lossy", wrap_tokenizer(backend, 512)), *ALIGNED)
    assert names(result) == {"tokenizers-far-apart": "warning"}
    assert "32 texts do not round-trip through the teacher's tokenizer" in result.findings[0].evidence


def test_pair_without_common_text_is_refused(tmp_path: Path) -> None:
    """The teacher's tokenizer writes `%` before every text."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("%")
    result = examined(tmp_path, teacher_with(tmp_path / "none", tokenizer), *ALIGNED)
    assert names(result) == {"tokenizers-unalignable": "error"}
