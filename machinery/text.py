"""Text: made alike to be compared, split into words or parts, searched for a question, made harmless to be shown."""
import re
import unicodedata

LEAD_IN = re.compile(r"^(?:(?:so|thus|therefore|hence),? )?(?:the |my )?(?:final |correct )?(?:answer|result)"
                     r"(?: is|:| =)+\s*", re.IGNORECASE)
PLAIN_SIGNS = str.maketrans("−–—’‘“”×", "---''\"\"x")
PLAIN_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe"})


def clean(text: str) -> str:
    """Lower case, Latin letters without accents, plain dashes and quotes, without wrapping and lead-in."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFKC", text).translate(PLAIN_SIGNS)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    text = unicodedata.normalize("NFKD", text)
    text = re.sub("([\0-\u024f])[\u0300-\u036f]+", r"\1", text)    # accents of Latin letters only: か is not が
    text = unicodedata.normalize("NFC", text).casefold().translate(PLAIN_LETTERS)
    text = re.sub(r"\\boxed\{(.*)\}", r"\1", text.replace("**", ""))
    text = LEAD_IN.sub("", re.sub(r"\s+", " ", text.strip()))
    text = text.strip(" \"'`").removesuffix(".").strip(" \"'`")
    return text[1:-1].strip() if text[:1] + text[-1:] in ("[]", "()", "{}") else text


def token_texts(tokenizer, ids) -> dict[int, str]:
    """id -> the text of that token, to be shown. A part of a character has none: then its name in the vocabulary."""
    texts = {i: tokenizer.decode([i]) for i in set(ids)}
    return {i: tokenizer.convert_ids_to_tokens(i) if "\ufffd" in text else text for i, text in texts.items()}


def tokens(text: str) -> list[str]:
    """Words and numbers of a cleaned text; a number keeps sign and decimals, c++ and c# their ending."""
    found = re.findall(r"(?<![\w)])-?\d+(?:[.,:/]\d+)*|[^\W_]+[+#]*", text)
    return [t for t in found if t not in ("the", "a", "an")] or found


def parts(text: str) -> list[str]:
    """The parts of a list, without bullets and numbering."""
    if ", " in text or ";" in text:
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)    # 1,200, 3,400
    found = re.split(r"[,;\n]|\band\b", text)
    found = [re.sub(r"^ *(?:[-*•]|\d+[.)]) +", "", part).strip(" '\"") for part in found]
    return [part for part in found if part]


def ngrams(text: str) -> set[tuple]:
    """The sequences of 8 words of a text, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + 8]) for i in range(len(words) - 7)}


def holds_benchmark(text: str, question: str) -> bool:
    """Whether a page repeats the question itself: more than a quoted title, at least 40 % of its 8-grams."""
    asked = ngrams(question)
    return len(asked) >= 3 and len(asked & ngrams(text)) >= 0.4 * len(asked)


def harmless(text: str, limit: int) -> str:
    """Untrusted text as one line, at most `limit` characters: no controls, template tokens, marks or verdicts."""
    text = unicodedata.normalize("NFKC", text[:4 * limit])
    text = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text)
    text = re.sub(r"\s+", " ", text).translate(str.maketrans("<>[]{}`|#", "‹›()()'¦ "))
    return re.sub("(?i)verdict", "v.", text)[:limit].strip()
