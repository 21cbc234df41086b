"""Engines that people serve with, started and told by specgym: other programs that decode speculatively."""
