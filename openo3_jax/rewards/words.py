"""Text -> the words that ROUGE compares: lower case, ASCII letters and digits, stemmed."""

import re

from nltk.stem.porter import PorterStemmer

_WORD = re.compile(r"[a-z0-9]+")
_LONGEST_ANY = 40  # characters; the stemmer is quadratic in a run of "y", and no English word is longer


class Stemmer(dict[str, str]):
    """Splits text as `rouge_score` does with `use_stemmer=True`; itself the stems of the words it has seen.

    Source: src/r1-v/src/open_r1/reward_func.py:60-80; rouge_score 0.1.2, tokenize.py.
    """

    def __init__(self):
        super().__init__()
        self._porter = PorterStemmer()

    def words(self, text: str) -> list[str]:
        """Example: `Stemmer().words("The cats, running!")` is `["the", "cat", "run"]`."""
        return [self[word] for word in _WORD.findall(text.lower())]

    def __missing__(self, word: str) -> str:
        stem = self[word] = self._stem(word)
        return stem

    def _stem(self, word: str) -> str:
        is_cheap = len(word) <= _LONGEST_ANY or "yyy" not in word
        return self._porter.stem(word) if len(word) > 3 and is_cheap else word
