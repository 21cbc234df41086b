"""Programs that run by themselves beside an engine: each a single file of the standard library and its engine.

They are started by their path, in the engine's interpreter, where this package need not be installed.
"""
