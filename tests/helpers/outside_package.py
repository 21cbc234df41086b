"""A package outside this one whose decoder is the file in docs/add-a-decoder.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-decoder.md"


def install(folder: Path) -> None:
    """Write the module `copy_last` and the metadata of its distribution, as pip would, into a folder for `sys.path`."""
    source = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert source is not None, f"{PAGE} shows no decoder"
    (folder / "copy_last.py").write_text(source[1], encoding="utf-8")
    metadata = folder / "copy_last-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: copy-last\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(
        "[specgym.decoders]\ncopy-last = copy_last:CopyLastDecoder\n", encoding="utf-8"
    )
