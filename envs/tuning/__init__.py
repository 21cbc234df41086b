"""Environments whose actions move a decoder's knobs."""

import lazy_loader

# Specs that were saved earlier name the environment's class by this module.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"env": ["TuningEnv"]})
