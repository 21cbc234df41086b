"""Files changed on purpose, with checksums that fit again: what a reader must refuse is then their content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specgym.decoding import FILES, file_digests, write_sealed


def reseal(path: Path, **changes: Any) -> None:
    """Rewrite a JSON object with some changes, and with new digests of the files that it lists."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    content.pop("sha256", None)
    if isinstance(content.get(FILES), dict):
        content[FILES] = file_digests(path.parent, content[FILES])
    write_sealed(path, content)
