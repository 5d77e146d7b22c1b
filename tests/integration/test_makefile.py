"""The Makefile's programs in tests/support start with the paths that it gives them."""

from __future__ import annotations

import re
from pathlib import Path

from forked_runs import Place, warm_runs

ROOT = Path(__file__).parents[2]
LINES = [
    line.strip()
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    if "$(PY) tests/support/" in line
]
# Print the help of each program of the arguments, as Python would start it, in one fork: the imports take most of the time.
HELP = """
import pathlib, runpy, sys
path = [entry for entry in sys.path if not entry.endswith("tests/support")]  # which pytest adds
for program in sys.argv[1:]:
    sys.path[:], sys.argv = [str(pathlib.Path(program).resolve().parent), *path], [program, "--help"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        print("ended", program, end.code)
"""


def test_makefile_programs_start_and_know_their_options(tmp_path: Path) -> None:
    options: dict[str, set[str]] = {}
    for line in LINES:
        match = re.fullmatch(r"PYTHONPATH=\. \$\(PY\) (tests/support/\w+\.py)( .*)?", line)
        assert match is not None, line
        options.setdefault(match[1], set()).update(re.findall(r"--\w+", match[2] or ""))
    script = tmp_path / "help.py"
    script.write_text(HELP, encoding="utf-8")
    done = warm_runs().run(*options, whole=True, place=Place(ROOT, ROOT, script))
    assert done.code == 0, done.err
    helps = re.split(r"^ended ", done.out, flags=re.MULTILINE)
    assert [text.splitlines()[0] for text in helps[1:]] == [f"{program} 0" for program in options], done.err
    for program, text in zip(options, helps, strict=False):
        assert program.rpartition("/")[2] in text and all(option in text for option in options[program]), text


def test_makefile_runs_fuzz_chaos_and_endurance() -> None:
    programs = [re.findall(r"tests/support/(\w+)\.py", line)[0] for line in LINES]
    assert programs == ["fuzz", "fuzz", "fuzz", "chaos", "endurance"]
    assert [re.findall(r"--kind (\w+)", line) for line in LINES[:3]] == [[], ["hostile_tokenizer"], ["sandbox"]]
