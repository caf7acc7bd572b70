"""Terms of what is fetched: which text was accepted, and when."""

import datetime
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathsegdiff.files import replace_file

#: Name -> {"accepted": date, "sha256": of the text that was shown}.
LICENCES_FILE = "licences.json"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a user agrees to.

    Attributes:
        name: Of the data set or the model.
        text: Licence and citation, as they are shown.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Of the text: other terms must be accepted anew."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def is_accepted(folder: Path, terms: Terms) -> bool:
    """Whether exactly this text was accepted before; False where the record cannot be read."""
    entry = _read(folder).get(terms.name)
    return isinstance(entry, dict) and entry.get("sha256") == terms.sha256


def remember(folder: Path, terms: Terms) -> None:
    """Record in ``folder`` that a text was accepted today."""
    accepted = {"accepted": datetime.date.today().isoformat(), "sha256": terms.sha256}
    text = json.dumps({**_read(folder), terms.name: accepted}, indent=2) + "\n"
    replace_file(folder / LICENCES_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / LICENCES_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
