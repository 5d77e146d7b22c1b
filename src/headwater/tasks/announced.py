"""Find the answer that a text announces: GSM8K's `####`, "The answer is …" in several languages, a heading "Final answer".

Everything here takes linear time, so it can run in the parent process on untrusted text.
"""

from __future__ import annotations

import re
from collections import deque

LONGEST_STATEMENT = 4000  # characters read after "the answer is"

_CHOSEN = r"[(（]?(?-i:[A-Ja-j])(?![a-zA-Z的])"  # a choice's letter
# A value that ends the sentence: the verb may stand before the noun ("Daher ist die Antwort 42.") or nowhere ("Cevap 42'dir.").
_VALUE_ENDS = (
    r"(?=\s?(?:\$[^$\n]{1,200}\$|\*{0,2}[-+]?\d[\d.,/٫٬]{0,40}?\*{0,2})"
    r"\s?(?:است|है|ہے|['’]?[dt][ıiuü]r)?\s?(?:[.!।۔。]?\s*$|[.!।۔]\s|。|[.!।۔]?\n))"
)
# Language: (noun, verbs that may follow it instead of a colon). Negations ("ist nicht", "不是") are no such verb.
_NOUNS_AND_VERBS = {
    "Chinese": (r"(?:答案|正[确確][选選][项項])", r"(?:[应應][该該當当]?)?(?:就?是|[为為选選])|等[于於]"),
    "Chinese, result": (r"最[终終][的]?结果", r"就?是|[为為]|等[于於]"),
    "Chinese, a choice": (
        r"(?<!不)(?:故|(?:因此|所以|[综綜]上)[,，]?(?:[应應][该該]?)?)[选選]",
        rf"[项項擇择]?(?=\s?{_CHOSEN})",
    ),
    "Chinese, a choice alone": (r"(?<![^\n])[选選][项項]?", rf"(?=\s?{_CHOSEN}\s*[。.]?\s*$)"),
    "Japanese": (r"(?:答え?|解答|回答|正解)", r"は"),
    "Korean": (r"(?:정답|답변?)", r"[은는]"),
    "German": (r"\bantwort", r"ist\b|lautet\b|beträgt\b"),
    "French": (r"\br[ée]ponse(?:\s(?:finale|correcte|exacte))?", r"est\b|vaut\b"),
    "Spanish": (r"\brespuesta(?:\s(?:final|correcta))?", r"es\b|son\b"),
    "Italian": (r"\brisposta(?:\s(?:finale|corretta|esatta))?", r"[èé](?!\w)|e['’]"),
    "Portuguese": (r"\bresposta(?:\s(?:final|correta|certa))?", r"é(?!\w)"),
    "Dutch": (r"\bantwoord", r"is\b|luidt\b"),
    "Swedish, Danish, Norwegian": (r"\bsvaret", r"är\b|er\b|blir\b"),
    "Swedish, Danish, Norwegian, short": (r"\bsvar", r"(?!)"),
    "Finnish": (r"\bvastaus", r"on\b"),
    "Polish": (r"\bodpowied[zź](?:ią)?", r"to\b|brzmi\b|wynosi\b|jest\b"),
    "Czech, Slovak": (r"\bodpov[eě][dď]", r"je\b|zní\b|znie\b"),
    "Hungarian": (r"\bválasz", r"az?\b(?=\s?[-$\d])"),
    "Russian": (r"\bответ(?:ом)?", r"равен\b|это\b|составляет\b|является\b|[—–-]\s"),
    "Ukrainian": (r"\bвідповід(?:ь|дю)", r"це\b|дорівнює\b|є\b|[—–-]\s"),
    "Turkish": (r"\b(?:cevap|cevabımız|yanıt)", r"(?!)"),
    "Vietnamese": (r"\b(?:đáp\s(?:án|số)|câu\strả\slời)", r"là\b"),
    "Indonesian": (r"\bjawaban(?:nya)?(?:\sakhir(?:nya)?)?", r"adalah\b|ialah\b"),
    "Swahili": (r"\bjibu(?:\s(?:la\smwisho|sahihi))?", r"ni\b"),
    "Filipino": (r"\bsagot", r"ay\b"),
    "Romanian": (r"\brăspuns(?:ul)?(?:\s(?:final|corect))?", r"este\b"),
    "Greek": (r"\bαπάντηση", r"είναι\b"),
    "Arabic": (r"(?:ال)?(?:إجابة|اجابة|جواب)(?:\s(?:النهائية|النهائي|الصحيحة|الصحيح))?", r"ه[يو]\b"),
    "Persian, Urdu": (r"\b(?:پاسخ|جواب)(?:\s(?:نهایی|صحیح|درست))?", r"برابر(?:\sبا)?|یعنی"),
    "Hebrew": (r"ה?תשובה(?:\sה(?:סופית|נכונה))?", r"היא\b|הינה\b"),
    "Hindi": (r"(?:उत्तर|जवाब)", r"है|(?=\s?[-$\\\d])"),
    "Bengali": (r"উত্তর(?:টি)?", r"হলো|হল|হচ্ছে|ঃ"),
    "Thai": (r"คำตอบ(?:สุดท้าย|ที่ถูกต้อง)?", r"คือ|เท่ากับ"),
    "Tamil, Telugu": (r"(?:பதில்|விடை|సమాధానం)", r"(?!)"),
}
_PHRASE = re.compile(
    r"\bans(?:wer)?\b(?:\s(?:to|for|of)\s(?:the|this|your|our)\s(?:(?:original|given|math|whole)\s)?(?:question|problem|puzzle|riddle)"
    r"|,?\s(?:then|therefore|thus|hence)\b,?)?[*_:：\s]{0,8}"
    r"(?:(?:is|are|was|equals|(?:comes|works)\sout\sto|turns\sout\sto\sbe)\b|(?<=[:：])|(?<=[:：][*_])|(?<=[:：]\*\*)|="
    r"|(?:would|should|must|will|has\sto)\sbe"
    rf"(?=[\s*:]{{1,4}}(?:[-+$\\(*]{{0,4}}\d(?![\d,.]*[\s-](?:digit|decimal|significant|place))"
    rf"|\$|{_CHOSEN}))"
    r")[:：*_]{0,4}",
    re.IGNORECASE,
)
# The first letters of the nouns: most positions of a text fail here, which is five times as fast as trying every noun.
_FOREIGN_PHRASE = re.compile(
    "(?=[答最故因所综綜选選解回正정답aArRsSvVоОoOвВcCyYđĐjJαΑاإجپהתउजউคபவస])(?:"
    + "|".join(
        rf"{noun}(?:[*_\s]{{0,8}}(?:{verbs}|[:：=＝])|{_VALUE_ENDS})" for noun, verbs in _NOUNS_AND_VERBS.values()
    )
    + ")",
    re.IGNORECASE,
)
_NOUN = "|".join([r"answer", *(noun for noun, _ in _NOUNS_AND_VERBS.values())])
_ARTICLE = (
    r"(?:(?:the|my|die|la|il|a|o|el|het|final|correct|endgültige|итоговый|окончательный)\s+"
    r"|(?:最终|最終|最后的?|正确|최종)\s*){0,2}"
)
_LEADING_ARTICLE = re.compile(_ARTICLE, re.IGNORECASE)
# "#### Final answer", "**Answer**": a line of its own, above the answer. Marks are required, since "Answer" alone may be anything.
_HEADING = re.compile(
    rf"^[ \t]{{0,3}}(?:#{{1,6}}[ \t*_]*|\*\*|__){_ARTICLE}(?:{_NOUN})[ \t]?[*_:：]{{0,4}}[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
# GSM8K's mark, but not five.
_HASHES = re.compile(r"(?<!#)####(?!#)")
# Text after `####` that is a Markdown heading and no answer.
_LABEL = re.compile(
    rf"{_ARTICLE}(?:{_NOUN}|answers?|solution|lösung|result|conclusion|explanation|summary|verification|check|reasoning|analysis"
    r"|approach|proof|notes?|calculations?|(?:steps?|part|case|example|problem|question|schritt|[ée]tape|paso|步骤|шаг)\b.*"
    r"|第.{1,3}步.*|\d{1,2}[.)]\s+[^\W\d_]{2}.*)\s*[:：]?",
    re.IGNORECASE,
)
_NUMERAL = re.compile(r"[-+]?\\?\$?\s?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?\s?\\?%?\.?")
# Sentence ends: also of scripts without spaces, and their comma where the sentence goes on in words.
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？｡؟।۔；]|[，、](?=\s*[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
# Verbs that end a sentence: "答えは42です".
_FINAL_VERB = re.compile(
    r"\s*(?:です|である|だ|となります|になります|입니다|이다|이에요|예요|है|हैं|است|ہے|['’]?[dt][ıiuü]r)$"
)
# Between "the answer is" and the answer.
_ADVERB = re.compile(
    r"(?:therefore|thus|then|indeed|hence|simply|just|clearly|exactly|donc|alors|also|daher|somit|folglich|dus|alltså|således|entonces|pues"
    r"|quindi|dunque|portanto|então|zatem|więc|tedy|deci|jadi)\b[,:*\s]{1,4}(?=[-+$\\(*]{0,4}\d|\$|\\|[(*]{0,3}(?-i:[A-J])\b)",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).){1,4000})</answer>", re.DOTALL | re.IGNORECASE)
_OR = (
    r"或者?|和|及|または|又は|と|또는|과|와|oder|und|ou|et|o|u|y|e|of|en|och|og|eller|lub|i|nebo|или|и|або|та|veya|ve|hoặc|và|atau|dan|"
    r"sau|și|ή|και|أو|و|או|या|और"
)
_BETWEEN = re.compile(rf"(?<=[\d$)}}])\s*(?:{_OR})\s*(?=[-+]?[\d$(\\])")
_MORE = re.compile(rf"\s*(?:[,，、]|or\b|and\b|{_OR})\s*(?=\$|\\\()")


def announced_answer(text: str) -> str | None:
    """Answer between the last `<answer>` tags, else after the last `####` that an answer follows, else after the last announcement in
    words; None without any.

    Example: `announced_answer("#### Step 1\\n…\\n#### 42")` and `announced_answer("所以答案是42。")` give `"42"`.
    """
    tagged = last_match(_TAGGED, text)
    if tagged is not None and (answer := tagged[1].strip()):
        return without_announcement(answer)
    for mark in reversed(list(_HASHES.finditer(text))):
        line = first_line(text[mark.end() :])
        if line and not _is_label(line):
            return _after_phrase(line) or line
        statement = _after_phrase(text[mark.start() :])
        if statement:  # under "#### Final answer"; earlier marks are headings too
            return statement
    return _after_phrase(text)


def marked_answer(text: str) -> str | None:
    """Answer after GSM8K's `####` on the last line of a reference solution; None if the marks are headings or missing.

    Example: `marked_answer("48+24=72\\n#### 72")` is `"72"`; `marked_answer("#### Final answer\\n72")` is None.
    """
    marks = list(_HASHES.finditer(text))
    if not marks:
        return None
    rest = text[marks[-1].end() :].rstrip()
    line = first_line(rest).strip()
    if not line or _is_label(line):
        return None
    rest = rest.strip()
    if "\n" not in rest or rest.startswith("\\begin"):
        return rest
    return line if len(marks) == 1 and _NUMERAL.fullmatch(line) else None


def without_announcement(answer: str) -> str:
    """Remove the words at the start of an answer that announce it; an answer without any is unchanged.

    Example: `without_announcement("Final answer: 42")` is `"42"`.
    """
    spelled = answer.lstrip(" *_")
    starts = {0, _LEADING_ARTICLE.match(spelled).end()}  # type: ignore[union-attr]  # always matches, possibly the empty string
    announced = any(phrase.match(spelled, start) for phrase in (_PHRASE, _FOREIGN_PHRASE) for start in starts)
    return (_after_phrase(spelled) if announced else None) or answer


def first_line(text: str) -> str:
    """First line without the emphasis around it."""
    return text.lstrip(" \t*").split("\n", 1)[0].rstrip().removesuffix("**")


def _is_label(line: str) -> bool:
    return _LABEL.fullmatch(line.strip(" \t*_")[:200]) is not None


def _after_phrase(text: str) -> str | None:
    """Statement after the last "answer is …", "Answer: …" or heading "Answer"; None without any, or if it is empty."""
    matches = [match for pattern in (_PHRASE, _FOREIGN_PHRASE, _HEADING) if (match := last_match(pattern, text))]
    if not matches:
        return None
    last = max(matches, key=lambda match: match.end())
    return _statement(text[last.end() : last.end() + LONGEST_STATEMENT], last.re is not _PHRASE)


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _statement(text: str, foreign: bool) -> str:
    """Answer at the start of a text: its formula if it starts with one, else its first sentence.

    foreign  the announcement may be in another language than English: words like "oder" and "或" between formulas make a list
    """
    text = text.lstrip(" \t\n*_:：")
    if adverb := _ADVERB.match(text):
        text = text[adverb.end() :].lstrip("*_")
    for opening, closing in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$")):
        if text.startswith(opening):
            end = text.find(closing, len(opening))
            if end >= 0:
                if _MORE.match(text, end + len(closing)) is None:
                    return text[len(opening) : end]
                break  # "$2$ or $3$": the whole sentence is the answer
    line = first_line(text)
    stop = _SENTENCE_END.search(line)
    if stop is not None and stop.group() in "?？؟":
        return ""  # "The answer is 42? No": a question states nothing
    sentence = line[: stop.start() if stop else None].strip().strip("*_").strip()
    return _BETWEEN.sub(" , ", _FINAL_VERB.sub("", sentence).strip("*_")) if foreign else sentence


# Solutions ------------------------------------------------------------------------------------------------------------

_CJK_PROSE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{6}")
_MARKDOWN_HEADING = re.compile(r"^\s{0,3}#{1,6}\s", re.MULTILINE)
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")
MOST_WORDS = 30  # of an answer; what is longer explains it
MOST_WORDS_OF_A_LINE = 2  # of an answer of several lines


def is_solution(text: str) -> bool:
    """Whether a text explains an answer rather than being one: several lines with prose or headings, or many words.

    Example: `is_solution("Add both.\\nThat makes 42 apples in all.")` is True, `is_solution("x = 1\\ny = 2")` is False.
    """
    lines = [] if "\\begin" in text else [line for line in text.split("\n") if line.strip()]
    words = [sum(1 for _ in _WORD.finditer(line)) for line in lines]
    if len(lines) > 1 and (
        max(words) > MOST_WORDS_OF_A_LINE or _CJK_PROSE.search(text) or _MARKDOWN_HEADING.search(text)
    ):
        return True
    return sum(1 for _ in _WORD.finditer(text)) > MOST_WORDS
