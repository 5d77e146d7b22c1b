"""Every command of the README and the docs is listed in one of these tables, which says whether and how it is run.

VERBATIM        run literally, in a folder with a recipe, problems and finished runs
SCALED_DOWN     run in a form that takes seconds instead of minutes or days, or with a file in place of DATA
PARSED_ONLY     needs other hardware, another program or the network; the reason, and which test covers it
OTHER_PROGRAMS  lines that do not start with `headwater`
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from functools import cache
from pathlib import Path

import pytest

from forked_study import start
from headwater.config.builtin import builtin_text
from headwater.tasks import sums
from runs import TINY, CommandResult, call, tiny
from tests.integration.test_docs import EXAMPLES, PAGES, ROOT, commands, parse_error

FEW = "--set data.labeled.generate.count=600 --set data.evals.sums.generate.count=8"
"""Problems of a scaled-down `pocket`: the largest budget of the sweeps below is 512."""
STUDY = f"study pocket --dry-run {FEW}"

VERBATIM = {  # command -> regular expression of its output
    "eval --compare before.json after.json": r"lenient +student 50.0% +student 100.0% +2 +\+50.0 points",
    "explain stages.opd": "objective: ",
    "explain stages.opd.optim.lr": "number > 0",
    "explain --schema > recipe.schema.json": '"title": "Headwater recipe"',
    "init --all": "microbatch_tokens: ",
    "init gsm8k": "student: ",
    "init paper-qwen3-1.7b": "student: ",
    "init pocket": "student: pocket:qwen3-student",
    "init improved": "prompts: every",
    "init pocket > my.yaml": "student: pocket:qwen3-student",
    "validate problems.jsonl": "300 labels, 0 fail",
    "validate problems.jsonl --task sums": "300 labels, 0 fail",
    "doctor my.yaml": "no errors",
    "run my.yaml --dry-run": "teacher_rl",
    "run my.yaml --dry-run --json": '"steps": ',
    "run gsm8k --dry-run --on h100": "GPU-hours",
    "run gsm8k --dry-run --on rtx4090": "GPU-hours",
    "study gsm8k-qwen2.5 --arms direct_grpo,bridge --dry-run --on rtx4090": r"which fits",
    "run pocket --arm bridge --set stages.opd.dense.divergence=jsd --dry-run": "opd",
    "run pocket --arm bridge --set stages.teacher_rl.group_size=16 --dry-run": "teacher_rl",
    "run pocket --arm warmup_only --set stages.warmup.dense.top_k=8 --dry-run": "warmup",
    "run pocket --arm bridge --set 'stages.opd.dense.teacher_weights={teacher: 1.25, base_teacher: -0.25}' --dry-run": "opd",
    "run pocket --arm bridge --set stages.opd.dense.gain_over=base_teacher --dry-run": "opd",
    "run pocket --arm bridge --set stages.warmup.prompts=every --set stages.warmup.group_size=1 "
    "--set stages.opd.prompts=every --dry-run": "opd",
    "run pocket --arm bridge --set 'stages.warmup.lora={r: 16, alpha: 32}' --set stages.warmup.optim.lr=3e-3 --dry-run": "warmup",
    "run pocket --arm opd_only --set stages.opd.dense.tokenizers=prefix --dry-run": "opd",
    "study pocket --arms all --dry-run": "teacher_rl",
    "study pocket --arms improved --seeds 0,1 --dry-run": "opd.s1",
    "study pocket --arms bridge,direct_grpo,raw_teacher --seeds 0,1,2 --dry-run": "teacher_rl",
    "study pocket --arms bridge_1h,bridge_rl,replay --dry-run": "student_rl",
    "study paper-qwen3-1.7b --arms direct_grpo,bridge --dry-run --on 16xh200 --mean-tokens 3000": "GPU-hours",
    "study desk --dry-run": "teacher_rl",
    "report runs/demo": "report: runs/demo/report.html",
    "report runs/demo --audit": "holds",
    "report runs/a runs/b": "seeds 0, 1",
    "report runs/seed0 runs/seed1 --out runs/both": "report: runs/both/report.html",
    "report DIR/256": "report: DIR/256/report.html",
    "doctor own_grader.yaml": "no errors",
    "run own_grader.yaml --out runs/own_grader": "report: runs/own_grader/report.html",
    "watch runs/demo": r"(\d+) of \1 nodes done",
}

SMALL = " ".join(f"--set {change}" for change in TINY if not change.startswith("data."))
SCALED_DOWN = {  # command -> what is run instead, and a regular expression of its output
    "distill STUDENT TEACHER --prompts FILE": (
        "distill pocket:qwen3-student pocket:qwen3-teacher --prompts problems.jsonl --out runs/distill --set stages.opd.steps=2 "
        "--set stages.opd.batch_size=8 --set stages.opd.sampling.max_tokens=24",
        "KL",
    ),
    "grpo MODEL --data FILE": (
        "grpo pocket:qwen3-student --data problems.jsonl --task sums --out runs/grpo --set stages.student_rl.steps=1 "
        "--set stages.student_rl.batch_size=16 --set stages.student_rl.sampling.max_tokens=24 --set guards.no_signal=continue",
        "mean reward",
    ),
    "init [NAME]": ("init", "student: pocket:qwen3-student"),
    "run RECIPE [--arm NAME]": ("run my.yaml --arm direct_grpo --out runs/one SMALL", "direct_grpo"),
    "run gsm8k": ("run gsm8k --dry-run", "teacher_rl"),
    "run my.yaml": ("run my.yaml --out runs/my SMALL", "bridge"),
    "run my.yaml --out runs/my": ("run my.yaml --out runs/my SMALL", "bridge"),
    "study RECIPE [--arms a,b] [--seeds 0,1]": ("study my.yaml --arms direct_grpo,raw_teacher --dry-run", "student_rl"),
    "study my.yaml --arms direct_grpo,raw_teacher,bridge --seeds 0,1,2 --out runs/my-study": (
        "study my.yaml --arms direct_grpo,raw_teacher,bridge --seeds 0 --out runs/my-study SMALL",
        "bridge − direct_grpo",
    ),
    "study my.yaml --seeds 0 --out runs/seed0": ("study my.yaml --seeds 0 --dry-run", "teacher_rl"),
    "study my.yaml --seeds 1 --out runs/seed1": ("study my.yaml --seeds 1 --dry-run", "teacher_rl"),
    "study pocket --arms direct_grpo,bridge": (f"{STUDY} --arms direct_grpo,bridge", "teacher_rl"),
    "study pocket --arms all --seeds 0,1,2,3,4 --out RUNS/main": (
        f"{STUDY} --arms all --seeds 0,1,2,3,4",
        "teacher_rl",
    ),
    "study pocket --seeds 0,1,2,3,4 --arms direct_grpo,raw_teacher,bridge,warmup_only,opd_only  --set "
    "models.student=pocket:llama-student --set models.teacher=pocket:llama-teacher --set models.expert=null "
    "--out RUNS/llama": (
        f"{STUDY} --seeds 0,1,2,3,4 --arms direct_grpo,raw_teacher,bridge,warmup_only,opd_only --set "
        "models.student=pocket:llama-student --set models.teacher=pocket:llama-teacher --set models.expert=null",
        "teacher_rl",
    ),
    "study pocket-skills --arms bridge_1h,bridge_rl,replay --seeds 0,1,2,3,4 --set stages.teacher_rl.epochs=20 "
    "--set guards.no_signal=continue  "
    "--set data.labeled.generate.dials.skills=96 --set data.evals.skills.generate.dials.skills=96 --out RUNS/skills-96": (
        "study pocket-skills --arms bridge_1h,bridge_rl,replay --seeds 0,1,2,3,4 --set stages.teacher_rl.epochs=20 "
        "--set guards.no_signal=continue --set data.labeled.generate.count=200 --set data.evals.skills.generate.count=8 "
        "--set data.labeled.generate.dials.skills=96 --set data.evals.skills.generate.dials.skills=96 --dry-run",
        "teacher_rl",
    ),
    "study pocket --arms improved --seeds 101,102,103,104,105 --set conditions.problems=0 --set data.evals.sums.generate.seed=101 "
    "--out RUNS/follow-ups": (
        f"{STUDY} --arms improved --seeds 101 --set conditions.problems=0 --set data.evals.sums.generate.seed=101",
        "teacher_rl",
    ),
    "study pocket --arms bridge,bridge_plus --seeds 0,1,2,3,4,5,6,7,8,9 --set models.student=pocket:llama-student  "
    "--set models.teacher=pocket:llama-teacher --set models.expert=null --set conditions.problems=0 --out RUNS/llama-plus": (
        f"{STUDY} --arms bridge,bridge_plus --seeds 0 --set models.student=pocket:llama-student "
        "--set models.teacher=pocket:llama-teacher --set models.expert=null --set conditions.problems=0",
        "teacher_rl",
    ),
    "study pocket-skills --arms bridge,bridge_plus --seeds 0,1,2,3,4 --set stages.teacher_rl.epochs=20 "
    "--set guards.no_signal=continue  --set labels.split=full --set conditions.problems=0 --out RUNS/skills-plus": (
        "study pocket-skills --arms bridge,bridge_plus --seeds 0 --set stages.teacher_rl.epochs=20 --set guards.no_signal=continue "
        "--set data.labeled.generate.count=200 --set data.evals.skills.generate.count=8 "
        "--set labels.split=full --set conditions.problems=0 --dry-run",
        "teacher_rl",
    ),
    "study pocket --arms bridge,bridge_plus --seeds 0,1,2,3,4,5,6,7,8,9 --set conditions.problems=0 "
    "--set data.evals.longer.generate.pool=eval  --set data.evals.longer.generate.count=250 "
    "--set data.evals.longer.generate.dials.min_terms=7 --set data.evals.longer.generate.dials.max_terms=7 --out RUNS/improved": (
        f"{STUDY} --arms bridge,bridge_plus --seeds 0 --set conditions.problems=0 --set data.evals.longer.generate.pool=eval "
        "--set data.evals.longer.generate.count=250 --set data.evals.longer.generate.dials.min_terms=7 "
        "--set data.evals.longer.generate.dials.max_terms=7",
        "teacher_rl",
    ),
    "study pocket-countdown --arms direct_grpo,raw_teacher,bridge --seeds 0,1,2 --out RUNS/countdown": (
        "study pocket-countdown --arms direct_grpo,raw_teacher,bridge --seeds 0,1,2 --dry-run "
        "--set data.labeled.generate.count=300 --set data.evals.countdown.generate.count=8",
        "teacher_rl",
    ),
    "study desk --seeds 0,1,2 --out runs/desk": ("study desk --dry-run", "teacher_rl"),
    "study my.yaml --arms all --seeds 0,1,2 --executor ray --out /shared/my": (
        "study my.yaml --arms all --seeds 0,1,2 --executor ray --dry-run",
        "teacher_rl",
    ),
    "sweep RECIPE --vary labels\\|teacher\\|lambda\\|FIELD": (
        f"sweep pocket --vary labels --seeds 0,1,2 --dry-run {FEW}",
        "labels",
    ),
    "sweep RECIPE --vary WHAT [--values a,b,c] [--arms a,b] [--seeds 0,1] [--out DIR]": (
        "sweep my.yaml --vary labels --values 8,16 --arms direct_grpo --seeds 0 --out runs/labels SMALL",
        "direct_grpo",
    ),
    "sweep my.yaml --vary labels --values 64,128,256": (
        "sweep my.yaml --vary labels --values 64,128,256 --dry-run",
        "256",
    ),
    "sweep my.yaml --vary stages.opd.optim.lr --values 1e-4,3e-4,1e-3 --arms bridge --seeds 101": (
        "sweep my.yaml --vary stages.opd.optim.lr --values 1e-4,3e-4,1e-3 --arms bridge --seeds 101 --dry-run",
        "0.0003|3e-4",
    ),
    "sweep pocket --vary labels --seeds 0,1,2": (f"sweep pocket --vary labels --seeds 0,1,2 --dry-run {FEW}", "labels"),
    "sweep pocket --vary lambda --seeds 0,1,2": (
        f"sweep pocket --vary lambda --seeds 0,1,2 --dry-run {FEW}",
        "lambda|λ",
    ),
    "sweep pocket --vary teacher --seeds 0,1,2": (
        f"sweep pocket --vary teacher --seeds 0,1,2 --dry-run {FEW}",
        "teacher",
    ),
    "sweep pocket --vary labels --values 64,128,256,512 --seeds 0,1,2 --out RUNS/labels": (
        f"sweep pocket --vary labels --values 64,128,256,512 --seeds 0,1,2 --dry-run {FEW}",
        "512",
    ),
    "sweep pocket --vary lambda --seeds 0,1,2 --out RUNS/lambda": (
        f"sweep pocket --vary lambda --seeds 0,1,2 --dry-run {FEW}",
        "lambda|λ",
    ),
    "init mine --student STUDENT --teacher TEACHER --data problems.jsonl > my.yaml": (
        "init mine --student pocket:qwen3-student --teacher pocket:qwen3-teacher --data problems.jsonl --task sums",
        "lr: 3.0e-06",
    ),
    "init mine": (
        "init mine --student pocket:qwen3-student --teacher pocket:qwen3-teacher --data problems.jsonl --evals "
        "held-out.jsonl --task sums --device cpu",
        "labels:",
    ),
    "doctor RECIPE": ("doctor my.yaml", "no errors"),
    "doctor RECIPE [--arms a,b|all] [--set path=value] [--device auto|cpu|cuda] [--out DIR] [--verbose] [--json]": (
        "doctor my.yaml --arms direct_grpo,bridge --set labels.budget=128 --device cpu --out runs/none --verbose --json",
        '"findings"',
    ),
    "probe RECIPE": ("probe my.yaml --problems 8 --samples 8", "labels"),
    "probe my.yaml": ("probe my.yaml --problems 8 --samples 8", "labels"),
    "probe RECIPE [--problems N] [--samples K] [--out DIR] [--seed S] [--set path=value] [--device auto|cpu|cuda] "
    "[--json]": (
        "probe my.yaml --problems 8 --samples 8 --out runs/probe --seed 1 --set labels.budget=128 --device cpu --json",
        '"advice"',
    ),
    "eval MODEL --data DATA [--samples K]": (
        "eval pocket:qwen3-student --data held-out.jsonl --samples 2 --task sums --limit 4 --max-tokens 32",
        "avg@2",
    ),
    "eval MODEL --data held-out.jsonl --samples 8": (
        "eval pocket:qwen3-student --data held-out.jsonl --samples 8 --task sums --limit 2 --max-tokens 32",
        "pass@8",
    ),
    "eval STUDENT TEACHER --data held-out.jsonl --temperature 0 --save after.json": (
        "eval pocket:qwen3-student pocket:qwen3-teacher --data held-out.jsonl --temperature 0 --save new.json --task sums --limit 2 "
        "--max-tokens 16",
        "pocket:qwen3-teacher +held-out.jsonl +2 ",
    ),
    "grade --data FILE": ("grade --data graded.jsonl", '"correct": true'),
    "grade --data FILE --task TASK": ("grade --data graded.jsonl --task numeric", '"correct": true'),
    'validate FILE --problem "{context} {question}"': (
        'validate problems.jsonl --problem "{question} {answer}" --task sums',
        "300 labels",
    ),
    "validate DATA": ("validate held-out.jsonl --task sums", "4 labels, 0 fail"),
    "report DIR…": ("report runs/demo --json", '"verdict"'),
    "watch DIR": ("watch runs/demo --json", '"running": false'),
}

PARSED_ONLY = {
    "study smollm2-arithmetic --arms direct_grpo,bridge,opd_only,warmup_only,teacher_sft --set "
    "models.student=.real/SmolLM2-135M-Instruct --set models.teacher=.real/SmolLM2-135M-Instruct --out RUNS/smollm2": (
        "needs the weights of `make real`, and 90 minutes"
    ),
    "run smollm2-arithmetic --arm raw_teacher --set models.student=.real/SmolLM2-135M-Instruct --set "
    "models.teacher=.real/Qwen2.5-Coder-0.5B-Instruct  --set stages.warmup.dense.tokenizers=prefix --set "
    "stages.opd.dense.tokenizers=prefix --set stages.warmup.steps=2 --set stages.warmup.batch_size=16  --set "
    "stages.opd.batch_size=8 --set stages.opd.group_size=2 --set stages.opd.steps=24 --set conditions.every=8 --set "
    "data.evals.one_operation.generate.count=60": "needs the weights of `make real`",
    "run examples/gsm8k_cpu.yaml --arm bridge_rl --out RUNS/gsm8k-cpu": "needs weights that tools.real fetches, and GSM8K",
    "study paper-qwen3-one-gpu --arms direct_grpo,bridge --out runs/paper": "needs a GPU",
    "validate --task python": "a sentence names it without its file",
    "demo": "takes minutes; it is the study `pocket` of the default arms, whose plan is printed above",
    "run my.yaml --set compute.sampler=vllm": "needs vLLM: tests/integration/engines/test_vllm_sampler.py, make test-engines",
    "run my.yaml --arm raw_teacher --set models.teacher=http://gpu-7:8000/v1": "server: tests/integration/test_teachers.py starts one",
    "merge ADAPTER OUT": "needs a trained adapter: tests/unit/models/test_lora.py",
    "push DIR --to ID": "needs the hub: tests/integration/test_ecosystem.py pushes to a local one",
    "push DIR --to owner/name": "needs the hub: tests/integration/test_ecosystem.py pushes to a local one",
    "study pocket --arms raw_teacher,raw_warmup_only": "an arm yet to be added: tests/integration/test_extending.py adds it",
    "validate FILE --task yes_no": "a task yet to be added: tests/integration/test_extending.py adds it",
    "report runs/demo --serve": "does not end by itself: the test below starts and ends it",
}

OTHER_PROGRAMS = {  # start of a line -> why it is not run here
    "make ": "every target is dry-run below; installation takes minutes",
    "pip install": "installs packages",
    ".venv/bin/python make_problems.py": "tests/integration/test_docs.py runs the script of the tutorial",
    "cd examples": "where the two commands after it are run",
    "torchrun --nproc-per-node 2 -m headwater run pocket": "tests/integration/test_torchrun.py starts two processes this way",
    "torchrun --nproc-per-node 8 -m headwater run my.yaml": "needs eight GPUs",
    "torchrun --nproc-per-node 8 -m headwater study paper-qwen3-1.7b": "needs eight GPUs",
    "torchrun --nnodes 2": "needs two machines; tests/integration/test_torchrun.py starts two agents on one",
    "vllm serve": "needs vLLM: tests/integration/engines/test_vllm_server.py, make test-engines",
    ".venv-bench/bin/python -m benchmarks": "needs the peers: tests/unit/test_benchmarks.py runs the harness without them",
    "python -m tools.real": "fetches real weights: make real",
    "python -m tools.parts split": "tests/integration/tools/test_gpu_study.py splits and joins a pocket model",
    "python -m tools.gpu_study": "needs a GPU: tests/integration/tools/test_gpu_study.py runs it with pocket models",
    "python -m tools.pretrain desk": "takes hours and a GPU: tests/integration/tools/test_pretrain_desk.py makes small models",
    "python -m benchmarks.sandbox": "takes minutes: tests/unit/test_benchmarks.py runs few gradings",
    "python -m benchmarks.ten_settings": "takes hours: tests/unit/test_benchmarks.py",
    "python -m benchmarks.other_tokenizers": "takes half an hour: tests/unit/test_benchmarks.py has its table",
    "python -m benchmarks.third_claim": "takes half an hour: tests/unit/test_benchmarks.py has its table",
    "python -m tools.pretrain pocket": "takes minutes: tests/unit/tools/test_pretrain_pocket.py makes small models",
}


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a recipe, problem files and the finished runs that the docs name."""
    folder = tmp_path_factory.mktemp("commands")
    for name, pool, count in (("problems", "train", 300), ("held-out", "eval", 4)):
        rows = [{"question": text, "answer": gold} for text, gold in sums.generate(count, pool, 0)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = builtin_text("pocket").replace("{generate: {pool: train, count: 2000}}", "problems.jsonl")
    recipe = recipe.replace("{generate: {pool: eval, count: 500}}", "held-out.jsonl")
    (folder / "mine.yaml").write_text(recipe)
    for name, share in (("before", 0.0), ("after", 1.0)):
        result_file = {
            "model": "student",
            "data": "test.jsonl",
            "by_problem": {"p": {"correct": 1.0}, "q": {"correct": share}},
        }
        (folder / f"{name}.json").write_text(json.dumps(result_file))
    row = {"id": "1", "gold": "47", "completion": "The answer is 47."}
    (folder / "graded.jsonl").write_text(json.dumps(row))
    for path in EXAMPLES.glob("*.*"):  # not what running an example leaves there, such as __pycache__
        shutil.copy(path, folder / path.name)
    for seed in (0, 1):
        result = tiny("run", folder / f"runs/seed{seed}", "--arm", "direct_grpo", "--seed", str(seed))
        assert result.code == 0, result.err
    for copy, of in (("runs/demo", 0), ("runs/a", 0), ("runs/b", 1), ("DIR/256", 0)):
        shutil.copytree(folder / f"runs/seed{of}", folder / copy, ignore=shutil.ignore_patterns("checkpoint"))
    return folder


def documented_commands() -> set[str]:
    """Every command in the docs, except verbs that are only named in a sentence."""
    return {command for _, command in commands() if len(command.split()) > 1 or command == "demo"}


def test_docs_commands_are_listed_in_one_table() -> None:
    tables = [*VERBATIM, *SCALED_DOWN, *PARSED_ONLY]
    assert len(tables) == len(set(tables))
    assert sorted(documented_commands() - set(tables)) == [] and sorted(set(tables) - documented_commands()) == []


@cache
def call_once(line: str) -> CommandResult:
    """Run a command line once, although several commands of the docs lead to it."""
    return call(*shlex.split(line))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", [*VERBATIM, *SCALED_DOWN])
def test_docs_command_runs(command: str, work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line_to_run, expected = (command, VERBATIM[command]) if command in VERBATIM else SCALED_DOWN[command]
    monkeypatch.chdir(work_folder)
    monkeypatch.syspath_prepend(str(work_folder))
    shutil.copy("mine.yaml", "my.yaml")
    line, _, target = line_to_run.replace("SMALL", SMALL).partition(" > ")
    result = call_once(line)
    assert result.code == 0, result.out + result.err
    assert re.search(expected, result.out), result.out
    if target:
        (work_folder / target).write_text(result.out)


@pytest.mark.parametrize("command", PARSED_ONLY)
def test_docs_command_parses(command: str) -> None:
    assert parse_error(command) is None
    for name in re.findall(r"tests/[\w/]+\.py", PARSED_ONLY[command]):
        assert (ROOT / name).exists()


def test_report_serve_answers_and_ends_on_interrupt(work_folder: Path, tmp_path: Path) -> None:
    server = start(tmp_path / "server", "report", work_folder / "runs/demo", "--serve", "--port", "0", whole=True)
    while (address := re.search(r"http://127\.0\.0\.1:\d+/", server.out())) is None:
        assert server.poll() is None, server.err()
        time.sleep(0.005)
    with urllib.request.urlopen(address[0], timeout=60) as answer:
        assert "direct_grpo" in answer.read().decode()
    server.kill(signal.SIGINT)
    assert server.wait(20) == 130


def test_docs_lines_of_other_programs_are_listed() -> None:
    lines = {
        line
        for text in PAGES.values()
        for line in re.findall(
            r"^    ((?:make|pip|cd|torchrun|vllm|ray|\S*python) .*?)(?:\s+#.*)?$", text, flags=re.MULTILINE
        )
    }
    assert len(lines) > 10
    assert [line for line in sorted(lines) if not line.startswith(tuple(OTHER_PROGRAMS))] == []
    assert [begins for begins in OTHER_PROGRAMS if not any(line.startswith(begins) for line in lines)] == []
    for line in lines:
        if "-m headwater " in line:
            assert parse_error(line.split("-m headwater ")[1]) is None


def test_docs_make_targets_exist() -> None:
    named = {
        name for text in PAGES.values() for name in re.findall(r"(?:^    |`)make ([a-z-]+)", text, flags=re.MULTILINE)
    }
    assert {"demo", "test", "bench", "docs"} <= named
    done = subprocess.run(["make", "--dry-run", *sorted(named)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
