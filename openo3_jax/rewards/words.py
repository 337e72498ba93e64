"""Text -> the words that ROUGE compares: lower case, ASCII letters and digits, stemmed."""

import re

from nltk.stem.porter import PorterStemmer

_NO_WORD = re.compile(r"[^a-z0-9]+")  # one class, one pass: linear in the text
_LONGEST_ANY = 40  # characters; the stemmer is quadratic in a run of "y", and no English word is longer


class Stemmer:
    """Splits text as `rouge_score` does with `use_stemmer=True`; remembers the stems it has seen.

    Source: src/r1-v/src/open_r1/reward_func.py:60-80; rouge_score 0.1.2, tokenize.py.
    """

    def __init__(self):
        self._porter = PorterStemmer()
        self._stems: dict[str, str] = {}

    def words(self, text: str) -> list[str]:
        """Example: `Stemmer().words("The cats, running!")` is `["the", "cat", "run"]`."""
        stems = self._stems
        found = []
        for word in _NO_WORD.sub(" ", text.lower()).split():
            stem = stems.get(word)
            if stem is None:
                stem = stems[word] = self._stem(word)
            found.append(stem)
        return found

    def _stem(self, word: str) -> str:
        is_cheap = len(word) <= _LONGEST_ANY or "yyy" not in word
        return self._porter.stem(word) if len(word) > 3 and is_cheap else word
