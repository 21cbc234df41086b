"""Learn a decoder's knobs, to tune them, or when to stop a draft, by reinforcement learning: ``train.py --help``."""

from specgym.agents import train_command

if __name__ == "__main__":
    raise SystemExit(train_command())
