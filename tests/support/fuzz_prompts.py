"""Fuzz cases of tokenizers and chat templates."""

from __future__ import annotations

import contextlib
import json
import random
from datetime import date, datetime
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fuzz_recipes import WrongError, examined, on_model
from headwater.config.prompt import Prompt
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.models.prompts import Prompter
from headwater.types import Problem, letters_and_digits
from malformed_inputs import NASTY, TEMPLATES, leaf, mutated, spoiled

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>", "<think>", "</think>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "17+45",
    "What is 2 + 2?",
    "  padded  ",
    "A line\nand another",
    "Find x, <b>now</b>",
    "x" * 60,
    "3</s>4",
    "a<think>b",
    "½ é",
    "12 12",
]
DAY = date(2024, 2, 29)


def write_model(folder: Path, vocabulary: int) -> None:
    config = AutoConfig.for_model(
        "qwen3", vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# Tokenizers -----------------------------------------------------------------------------------------------------------

CHARACTERS = [*map(chr, range(32, 127)), "\n", "\t", "½", "é"]


def random_backend(draw: random.Random) -> tuple[Tokenizer, bool]:
    """(tokenizer, whether its ids can be decoded to the original text)."""
    kind = draw.choice(["characters", "characters", "bytes", "words", "unigram", "byte fallback"])
    tokens = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    if kind == "characters":
        made = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    elif kind == "bytes":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("1", "2"), ("Ġ", "x"), ("x", "x"), ("xx", "xx")]
        parts = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
        made = Tokenizer(models.BPE({token: index for index, token in enumerate(parts)}, merges))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "words":
        made = Tokenizer(models.WordLevel(tokens | {"What": len(tokens), "is": len(tokens) + 1}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "unigram":
        pieces = [(token, -float(index)) for token, index in tokens.items() if token != " "]
        made = Tokenizer(models.Unigram([*pieces, ("▁", -200.0)], unk_id=SPECIAL.index("<unk>")))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        fallback = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS[:95]]
        made = Tokenizer(
            models.BPE(
                {token: index for index, token in enumerate(fallback)}, [], byte_fallback=True, unk_token="<unk>"
            )
        )
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    faithful = kind in ("characters", "bytes")
    if draw.random() < 0.2:
        made.normalizer = draw.choice(
            [
                normalizers.Lowercase(),
                normalizers.NFKC(),
                normalizers.Strip(),
                normalizers.Prepend("x"),
                normalizers.Replace("1", "2"),
            ]
        )
        faithful = False
    return made, faithful


def post_processor(draw: random.Random) -> Any:
    bos, eos = ("<s>", 1), ("</s>", 2)
    return draw.choice(
        [
            *(
                processors.TemplateProcessing(single=single, special_tokens=[bos, eos])
                for single in ("<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A </s> </s>", "</s> $A")
            ),
            processors.RobertaProcessing(eos, bos), processors.BertProcessing(eos, bos), processors.ByteLevel(),
            processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])]),
        ]
    )  # fmt: skip


def random_tokenizer(draw: random.Random) -> tuple[PreTrainedTokenizerFast, bool]:
    """(tokenizer with drawn special and added tokens, whether its ids can be decoded to the original text)."""
    made, faithful = random_backend(draw)
    if draw.random() < 0.6:
        made.post_processor = post_processor(draw)
    if draw.random() < 0.2:
        draw.choice([lambda: made.enable_truncation(5), lambda: made.enable_padding(length=20)])()
    flags = {name: draw.random() < 0.1 for name in ("lstrip", "rstrip", "single_word")}
    made.add_special_tokens([AddedToken(token, normalized=False, **flags) for token in SPECIAL[:-2]])
    made.add_tokens([AddedToken(token, special=draw.random() < 0.5, normalized=False) for token in SPECIAL[-2:]])
    if draw.random() < 0.3:
        made.add_tokens(draw.choice([["12"], [" 2"], ["zz" + "z" * n for n in range(30)]]))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    kept = {name: token for name, token in names.items() if draw.random() < 0.8}
    if draw.random() < 0.1:
        kept[draw.choice(list(names))] = draw.choice(["</s>", "<new>", "2", ""])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **kept)
    if draw.random() < 0.6:
        tokenizer.chat_template = draw.choice([CHATML, CHATML, "{{ bos_token }}{{ messages[-1].content }}"])
    return tokenizer, faithful and not any(flags.values())


def spoil_tokenizer(draw: random.Random, folder: Path) -> None:
    path = folder / draw.choice(["tokenizer.json", "tokenizer_config.json"])
    if draw.random() < 0.15:
        path.write_bytes(spoiled(draw, path.read_bytes()))
        return
    value = json.loads(path.read_bytes())
    if path.name == "tokenizer.json" or draw.random() < 0.4:
        value = mutated(draw, value)
    else:
        names = [
            "model_max_length",
            "add_bos_token",
            "add_eos_token",
            "padding_side",
            "tokenizer_class",
            "split_special_tokens",
        ]
        names += [
            "clean_up_tokenization_spaces",
            "chat_template",
            "eos_token",
            "added_tokens_decoder",
            "extra_special_tokens",
        ]
        hostile = [
            True,
            0,
            "left",
            "LlamaTokenizer",
            "GPT2Tokenizer",
            [{"name": "default", "template": CHATML}],
            {"a": 1},
            *NASTY,
        ]
        value[draw.choice(names)] = draw.choice([draw.choice(hostile), leaf(draw)])
    with contextlib.suppress(ValueError, RecursionError, UnicodeEncodeError):
        path.write_text(json.dumps(value), encoding="utf-8")


def tokenizer(draw: random.Random, folder: Path) -> str:
    """A model with a drawn tokenizer: prompts have the ids of their whole text, and ids that the model lacks are reported."""
    target = folder / "m"
    torch.manual_seed(0)
    made, faithful = random_tokenizer(draw)
    vocabulary = max(1, len(made) + draw.choice([0, 0, 0, 7, 64, -1, -3, -20]))
    write_model(target, vocabulary)
    made.save_pretrained(target)
    damaged = draw.random() < 0.4
    if damaged:
        spoil_tokenizer(draw, target)
    texts = draw.sample(TEXTS, 4)
    recipe = on_model(folder, [{"problem": text, "answer": "1"} for text in texts], target)
    result = examined(recipe, weights=draw.random() < 0.05)
    prompter = Prompter(ModelFolder.open(str(target), "models.student").tokenizer, Prompt())
    for text in texts:
        problem = Problem.of(text, "fuzz")
        ids = prompter.ids(problem)
        prompter.completion(ids)
        if not result.errors and max(ids) >= vocabulary:
            raise WrongError(f"id {max(ids)} of {text!r} is beyond the model's {vocabulary}, and no error says so")
        if not damaged:
            compare_with_backend(target, prompter, problem, ids, faithful)
    return result.error_names or "examined"


def compare_with_backend(
    folder: Path, prompter: Prompter, problem: Problem, ids: tuple[int, ...], faithful: bool
) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    text = prompter.text(problem)
    plain = tuple(backend.encode(text, add_special_tokens=False).ids)
    if prompter.has_template and ids != plain:
        raise WrongError(f"{text!r} has the ids {ids}, not {plain}")
    if ids[len(ids) - len(plain) :] != plain:
        raise WrongError(f"{text!r} has the ids {ids}, which do not end with {plain}")
    read = backend.decode(list(plain), skip_special_tokens=False)
    if faithful and "½" not in text and "é" not in text and read != text:
        raise WrongError(f"{text!r} comes back as {read!r}")


# Chat templates -------------------------------------------------------------------------------------------------------

HEADS = [
    "", "", "", "{{ bos_token }}",
    "{% set system = messages[0].content if messages[0].role == 'system' else 'Be brief.' %}{{ system }}\n",
    "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}", 
    "{{ strftime_now('%d %b %Y, %H:%M') }}\n",
    "{% if tools %}{{ tools | tojson }}{% endif %}", "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}",
    "{{ undefined }}",
    "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}", "{% set ns = namespace(last='') %}",
    "{{ undefined.field }}", "{% if strftime_now is defined %}Today {{ strftime_now('%Y-%m-%d') }}\n{% endif %}",
    "{{ [1, 2] | random }}\n",
]  # fmt: skip
GUARDS = [
    "", "", "", "", "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}",
    "{% if m.role not in ['user', 'assistant'] %}{% continue %}{% endif %}", "{% if loop.index > 2 %}{% break %}{% endif %}",
]  # fmt: skip
TURNS = [
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n",
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}", "{{ m.content[:12] }}\n",
    "{% if m.role == 'user' %}{{ m.content }}\n{% endif %}", "{{ m.content.split('</think>')[-1].lstrip('\\n') }}\n",
    "{{ m.role | upper }}: {{ m.content | tojson }}\n", "{{ m.content }}{{ m.tool_calls[0].name }}", "{{ m.name }}{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n",
    "{{ m.content + 1 }}", "{{ m.content | upper }}\n", "{% if loop.last %}{{ m.content }}{% endif %}", "{{- m.content -}}", "",
]  # fmt: skip
TAILS = [
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n", "", "</s>", "<|im_end|>",
    "<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}",
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
]  # fmt: skip


def chat(draw: random.Random) -> str:
    roll = draw.random()
    if roll < 0.04:
        return draw.choice(TEMPLATES[1:])  # the first takes five seconds wherever it is rendered
    text = f"{draw.choice(HEADS)}{{% for m in messages %}}{draw.choice(GUARDS)}{draw.choice(TURNS)}{{% endfor %}}{draw.choice(TAILS)}"
    if roll < 0.15:
        return spoiled(draw, text.encode()).decode("utf-8", "ignore")
    return text


def rendered_plainly(template: str, messages: list[dict[str, str]]) -> str | None:
    """Render a template by jinja2 with the variables that transformers documents; None if it fails."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": datetime(DAY.year, DAY.month, DAY.day).strftime}
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, enable_thinking=False, tools=None, documents=None, **special
        )
    except Exception:
        return None


def template(draw: random.Random, folder: Path) -> str:
    """A drawn chat template on questions and conversations: as jinja2 renders it, or refused; a turn left out is reported."""
    text = chat(draw)
    tokens = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names, chat_template=text)
    write_model(folder / "m", len(made))
    made.save_pretrained(folder / "m")
    (folder / "m" / "chat_template.jinja").write_text(text, encoding="utf-8")
    turns = [("user", "Let x be 5."), ("assistant", "Fine."), ("user", f"What is x plus {draw.randint(0, 9)}?")]
    problems = [Problem.of("What is 2 plus 2?", "fuzz"), Problem.of_turns(turns[2:], "fuzz")]
    if draw.random() < 0.6:
        system = [("system", "Answer modulo 7.")] if draw.random() < 0.5 else []
        problems.append(Problem.of_turns([*system, *turns[draw.choice([0, 2]) :]], "fuzz"))
    prompter = Prompter(ModelFolder.open(str(folder / "m"), "models.student").tokenizer, Prompt(), DAY)
    texts = [compare_with_jinja(prompter, problem, text) for problem in problems]
    rows = [{"prompt": prompter.messages(problem), "answer": "1"} for problem in problems]
    result = examined(on_model(folder, rows, folder / "m"), weights=draw.random() < 0.05)
    for problem, prompt in zip(problems, texts, strict=True):
        letters = letters_and_digits(prompt)
        lost = [content for content in problem.contents if letters_and_digits(content) not in letters]
        if lost and not result.errors:
            raise WrongError(f"{text!r} leaves {lost[0]!r} out of {prompt!r}, and no error says so")
    return result.error_names or "examined"


def compare_with_jinja(prompter: Prompter, problem: Problem, template: str) -> str:
    unchecked = "random" in template or template in TEMPLATES  # those have no bounds here
    wanted = None if unchecked else rendered_plainly(template, prompter.messages(problem))
    try:
        text = prompter.text(problem)
    except UserError as error:
        if wanted is not None:
            raise WrongError(f"{template!r} gives {wanted!r:.500}: {error}") from None
        raise
    if text != wanted and not unchecked:
        raise WrongError(f"{template!r} gives {text!r:.500}, and to jinja2 {wanted!r:.500}")
    if prompter.text(problem) != text:
        raise WrongError(f"{template!r} gives another text each time")
    return text
