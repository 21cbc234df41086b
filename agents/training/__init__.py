"""Training runs: settings files, run folders, PPO."""
