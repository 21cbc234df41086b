"""Decoding as Gymnasium environments.

The stub beside this file lists every public name; each is imported at its first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
