"""The paper's experiments as commands, a file each; all end with a claim that held or did not."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """What the command prints, and whether the claim held."""

    text: str
    holds: bool
