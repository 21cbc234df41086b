"""Tune and control speculative decoding of language models by reinforcement learning.

``import specgym`` registers the Gymnasium environments; text generation alone needs only ``specgym.decoding``.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the packages stand beside this folder, not inside it; an installed wheel has them inside.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file() and (_ROOT / "decoding").is_dir():
    __path__.append(str(_ROOT))

from . import moved  # noqa: E402
from .envs import register, register_environments  # noqa: E402  # on the path extended above

moved.install()
register_environments()

__all__ = ["__version__", "register"]
