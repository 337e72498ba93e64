"""How calls are worded: a name -> system message and text with slots. Own wordings, or those of a file."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openo3_jax.errors import InputError
from openo3_jax.evals import items, store

_DEFAULT = Path(__file__).with_name("default_wording.json")
SLOTS: Mapping[str, frozenset[str]] = {
    "vstar_what": frozenset(("question",)),
    "vstar_when_1": frozenset(("question", "duration")),
    "vstar_where_1": frozenset(("question", "first", "last")),
    "vstar_where_2": frozenset(("question", "count")),
    "vstar_when_2": frozenset(("question", "boxes", "width", "height")),
    "choice": frozenset(("question", "options")),
    "choice_in_text": frozenset(("question",)),
    "open": frozenset(("question",)),
    "grounding": frozenset(("question",)),
    "relevance": frozenset(("question",)),
}
_SLOT = re.compile(r"\{([a-z]+)\}")


@dataclasses.dataclass(frozen=True)
class Template:
    """`system` may be "", which leaves it to the chat template. `text` holds slots such as `{question}`."""

    system: str
    text: str

    def ask(
        self, *, video: str | os.PathLike | None = None, images: tuple[Any, ...] = (), **values: Any
    ) -> items.Conversation:
        """The conversation with the slots filled; braces of the values stay as they are."""
        return items.ask(self._fill(values), video=video, images=images, system=self.system)

    def show(self, media: Sequence[Mapping[str, Any]], **values: Any) -> items.Conversation:
        """The same with media items as they stand, such as crops."""
        asked = items.ask(self._fill(values), system=self.system)
        *before, user = asked
        return [*before, {**user, "content": [*media, *user["content"]]}]

    def _fill(self, values: Mapping[str, Any]) -> str:
        return _SLOT.sub(lambda slot: str(values.get(slot[1], slot[0])), self.text)


@dataclasses.dataclass(frozen=True)
class Wording:
    """Every template by name; the names and their slots are those of `SLOTS`."""

    templates: Mapping[str, Template]

    def __getitem__(self, name: str) -> Template:
        return self.templates[name]


def load_wording(file: Path | None = None) -> Wording:
    """This project's own wordings, those in the JSON `file` instead where it has them.

    Raises: InputError naming the entry for an unknown name, a missing field or an unknown or missing slot.
    """
    templates = _read(_DEFAULT)
    return Wording(templates if file is None else templates | _read(file))


def _read(file: Path) -> dict[str, Template]:
    entries = store.read_json(file)
    if not isinstance(entries, dict):
        raise InputError(f"{file}: holds a {type(entries).__name__}; expected an object of wordings by name")
    templates = {}
    for name, entry in entries.items():
        if name not in SLOTS:
            raise InputError(f"{file}: unknown wording {name!r}; expected one of {', '.join(SLOTS)}")
        is_texts = isinstance(entry, dict) and sorted(entry) == ["system", "text"]
        if not is_texts or not all(isinstance(value, str) for value in entry.values()):
            raise InputError(f"{file}: {name}: expected the texts system and text")
        found = set(_SLOT.findall(entry["text"]))
        if "question" not in found or found - SLOTS[name]:
            raise InputError(
                f"{file}: {name}: has the slots {sorted(found)}; expected question and any of {sorted(SLOTS[name])}"
            )
        templates[name] = Template(**entry)
    return templates
