"""Find the value with which a text ends: "Therefore, the total is $42$.", "Das Ergebnis ist 42.", for texts that announce no answer.

Weaker than an announcement, since such a sentence may state an intermediate value, so it counts only as the last sentence of the text,
complete with its full stop, and only if nothing in it hedges or negates. Linear time: only the last characters are read.
"""

from __future__ import annotations

import re

LONGEST_CONCLUSION = 500  # characters

_WORDS = (
    r"therefore|hence|thus|so|consequently|accordingly|in\s(?:total|conclusion|summary)|altogether|finally"
    r"|donc|ainsi|par\sconséquent|en\stout|also|daher|somit|folglich|deshalb|insgesamt|por\s(?:lo\s)?tanto|entonces|así\sque|en\stotal"
    r"|quindi|dunque|pertanto|in\stotale|portanto|logo|assim|então|no\stotal|dus|alltså|således|таким\sобразом|следовательно|итак"
    r"|значит|отже|zatem|więc|tedy|takže|deci|siis|tehát|bu\snedenle|vậy|do\sđó|jadi|oleh\skarena\situ|άρα|επομένως|kwa\shiyo"
)
_SPACELESS_WORDS = (
    r"因此|所以|综上所述|综上|最[终終]|故|したがって|従って|よって|따라서|그러므로|ดังนั้น|সুতরাং"
    r"|بنابراین|لذلك|إذن|لذا|לכן|इसलिए|अतः"
)
_NOUNS = (
    r"(?:(?:the|le|la|das|die|el|il|o|a|az|het|resultat|final|correct)\s){0,2}(?:result|value|solution|total|sum|résultat|valeur|ergebnis"
    r"|lösung|wert|resultado|solución|valor|risultato|soluzione|valore|solução|resultaat|oplossing|wynik|wartość|výsledek|результат"
    r"|решение|значение|rezultatul|tulos|eredmény|sonuç|kết\squả|hasil(?:nya)?|αποτέλεσμα)"
)
_SPACELESS_NOUNS = r"结果|結果|결과|ผลลัพธ์|ফলাফল|النتيجة|الحل|נתוצאה|परिणाम"
_START = re.compile(
    rf"(?:\A|(?<=[.!?:]\s)|(?<=[\n。！？]))[ \t*_>]{{0,4}}"
    rf"(?:(?P<word>(?:{_WORDS})\b|{_SPACELESS_WORDS})[,，、:]?\s?|(?={_NOUNS}\b|{_SPACELESS_NOUNS}))",
    re.IGNORECASE,
)
# Between the subject and its value.
_COPULA = (
    r"(?:\s(?:is|are|was|were|equals?|will\sbe|amounts\sto|comes\sto|est|sont|vaut|ist|sind|beträgt|lautet|es|son|è|sono|é|são|är|er"
    r"|to|wynosi|je|равен|равна|равно|составляет|дорівнює|este|on|là|adalah|είναι|ni)\b(?:\s(?:equal\sto|égale?\sà|gleich|therefore|thus|then|donc))?"
    rf"|(?:\A|\s)(?:ist|beträgt|lautet|is|är|er)\s{_NOUNS}\s"  # "Daher ist die Lösung 42."
    r"|是|[为為]|等[于於]|は|[은는]\s|คือ|হল|هي|هو|היא|=|:|：)[\s:：*]*"
)
_UNIT = r"(?:[\s-]?[^\W\d_]{1,20}\.?(?:/[^\W\d_]{1,10})?){0,4}"
_NUMERAL = rf"[-+−]?(?:\\?\$|[€£¥₹])?\s?[-+−]?\d[\d,.٫٬]*(?:\s?/\s?\d+)?\s?(?:\\?%|[€£¥°])?{_UNIT}"
_FORMULA = r"\$\$[^$]{1,300}\$\$|\$[^$]{1,300}\$|\\\(.{1,300}?\\\)|\\\[.{1,300}?\\\]"
_VALUE = re.compile(rf".*{_COPULA}\**(?P<value>(?:{_FORMULA}){_UNIT}|{_NUMERAL})", re.IGNORECASE)
_NAMED = re.compile(rf"(?P<value>{_FORMULA}|\w{{1,12}}\s?=\s?{_NUMERAL}|{_NUMERAL})", re.IGNORECASE)
_COMPLETE = re.compile(r"(?:[.!。।]|\$|\\\)|\\\]|\*\*|です|입니다)[\s*_\"]*\Z")
_FULL_STOP = re.compile(r"[.!?](?=\s)|[。！？]")
_DOUBT = re.compile(
    r"\?|？|\b(?:not|no|never|cannot|can't|isn't|if|unless|suppose|assume|may|might|could|maybe|perhaps|possibly|probably|about|around|roughly"
    r"|approximately|nearly|almost|at\sleast|at\smost|more|less|than|between|either|or|one\sof|some\sof|wrong|incorrect|impossible|as\s(?:is|are)"
    r"|first|second|next|step|nicht|kein|keine|etwa|ungefähr|wenn|falsch|mindestens|höchstens|oder|ne|n'est|pas|environ|si|ou|moins|plus"
    r"|casi|sino|não|quase|circa|non|se|не|если|около|или|niet|nie|nem|ei|inte|ikke|không|bukan|tidak)\b|n't\b|不|没|如果|约|約|ない|아니|않|ไม่",
    re.IGNORECASE,
)


def concluded_value(text: str) -> str | None:
    """Value of the last sentence of a text if it is a conclusion; None for any other ending.

    Example: `concluded_value("3 + 4 = 7. Therefore, the total is 7 apples.")` is `"7 apples"`.
    """
    tail = text.rstrip()[-LONGEST_CONCLUSION:]
    if _COMPLETE.search(tail) is None:
        return None  # "the number of ways is 2" may be cut off before "024"
    starts = list(_START.finditer(tail))
    if not starts or (len(text) > LONGEST_CONCLUSION and starts[-1].start() == 0):
        return None
    sentence = re.sub(r"(?<=[:\[$])\s*\n\s*|\s*\n\s*(?=\\\]|\$\$)", " ", tail[starts[-1].end() :])
    sentence = sentence.rstrip(' \t*_"').removesuffix("です").removesuffix("입니다").rstrip('.!。। \t*_"')
    if "\n" in sentence or _FULL_STOP.search(sentence) or _DOUBT.search(re.sub(_FORMULA, "", sentence)):
        return None
    match = (starts[-1]["word"] and _NAMED.fullmatch(sentence)) or _VALUE.fullmatch(sentence)
    return match["value"].strip() if match else None
