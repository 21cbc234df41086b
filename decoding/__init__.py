"""Generating text with a target and a draft. Knows torch and transformers; knows nothing of reinforcement learning.

The stub beside this file lists every public name; each is imported at its first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
