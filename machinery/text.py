"""Text: made alike to be compared, split into words or parts, searched for a question, made harmless to be shown."""
import re
import unicodedata

LEAD_IN = re.compile(r"^(?:(?:so|thus|therefore|hence),? )?(?:the |my )?(?:final |correct )?(?:answer|result)"
                     r"(?: is|:| =)+\s*", re.IGNORECASE)
PLAIN_SIGNS = str.maketrans("−–—’‘“”×", "---''\"\"x")
PLAIN_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe"})
WRAPPED = re.compile(r"""(\*\*|["'`*])((?:(?!\1).)+)\1|\\boxed\{([^{}]+)\}""")    # **Paris**, "Paris", `Paris`


def unwrapped(text: str) -> str:
    while match := WRAPPED.fullmatch(text):
        text = (match[2] or match[3]).strip()
    return text


def plain(text: str) -> str:
    """One line of plain dashes and quotes, without wrapping, lead-in and full stop. Case, accents, signs stay."""
    text = re.sub("[⁰¹²³⁴-⁹]+", lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[₀-₉]+", lambda match: "_" + unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFKC", text).translate(PLAIN_SIGNS)
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
    text = LEAD_IN.sub("", unwrapped(" ".join(text.split())))
    return unwrapped(re.sub(r"(?<!\.)\.$", "", text).strip())


def unaccented(text: str) -> str:
    """Latin letters without their accents; but か is not が."""
    text = re.sub("([\0-\u024f])[\u0300-\u036f]+", r"\1", unicodedata.normalize("NFKD", text))
    return unicodedata.normalize("NFC", text).translate(PLAIN_LETTERS)


def clean(text: str) -> str:
    """Plain, in lower case, without accents, Markdown's bold and brackets around it: to compare texts loosely."""
    text = unaccented(plain(text.replace("**", "")).casefold()).strip(" \"'`")
    return text[1:-1].strip() if text[:1] + text[-1:] in ("[]", "()", "{}") else text


def token_texts(tokenizer, ids) -> dict[int, str]:
    """id -> the text of that token, to be shown. A part of a character has none: then its name in the vocabulary."""
    texts = {i: tokenizer.decode([i]) for i in set(ids)}
    return {i: tokenizer.convert_ids_to_tokens(i) if "\ufffd" in text else text for i, text in texts.items()}


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
