"""Ship the tuner of a run, with its card, and bring the tables of docs/tuner.md up to date.

    python -m recipes.tuner runs/worlds
    python -m recipes.tuner runs/worlds --live runs/worlds-live.md

`recipes/make_tuner.sh` does all of it.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from specgym.agents import SHIPPED_TUNER, RunFolder, WorldsTransfer, load_settings
from specgym.decoding import replacing
from specgym.envs import HELD_OUT_BATCH_SIZES, HELD_OUT_CLASSES, HELD_OUT_PAIRS, HELD_OUT_TEMPERATURES

PAGE = Path("docs/tuner.md")
_CARD = """---
license: mit
library_name: specgym
tags: [reinforcement-learning, speculative-decoding, stable-baselines3]
---

# Tuner of exact speculative decoding

A policy that measures a few settings of draft length and stop threshold on a pair that it never saw, and recommends
one: `python evaluate.py --pair my-target+my-draft`. Two tanh layers of 64 units, {bytes:,} bytes of float32 weights;
what it sees and does is in `specgym.envs.WorldsVectorEnv`. The policy of seed {seed} ships, whatever the others reach.

## Made by

```
{command}
```

## Data

Recorded drafts of the package's own models on its own prompts, whose cards and licences are in
`specgym/decoding/data`, warped into {worlds} acceptance worlds, on computed and measured latencies
(`specgym.decoding.sensible_deployments`, `specgym/envs/data/latency`):

{workloads}

Kept apart for judging: the pairs {pairs}; hardware of the classes {classes}; batch sizes {batches}; temperature
{temperatures}.

## Results

{verdict}

{tables}
"""


@dataclass(frozen=True)
class Settings:
    """Ship the tuner of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of train.py --env specgym/SpeculativeWorlds-v0."""
    live: Path | None = None
    """File with the table that benchmarks.worlds_live printed."""


def between(page: str, mark: str, content: str) -> str:
    """Replace what stands between ``<!-- mark -->`` and ``<!-- /mark -->``.

    Raises:
        ValueError: the marks are not there.
    """
    changed, count = re.subn(
        rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda match: f"{match[1]}{content}\n{match[2]}", page, flags=re.S
    )
    if count != 1:
        raise ValueError(f"{PAGE} must have <!-- {mark} --> and <!-- /{mark} --> once, found them {count} times")
    return changed


def ship(settings: Settings) -> None:
    """Copy the first policy, and write its card and the tables."""
    run = RunFolder.existing(settings.run)
    learned, transfer = load_settings(run.settings), WorldsTransfer.load(settings.run / "worlds.json")
    folder = SHIPPED_TUNER
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("policy.safetensors", "policy.json"):
        with replacing(folder / name) as temporary:
            shutil.copyfile(run.first_policy / name, temporary)
    tables = "\n\n".join(f"{view.title}:\n\n{view.markdown()}" for view in transfer.views())
    card = _CARD.format(
        bytes=(folder / "policy.safetensors").stat().st_size,
        seed=learned.seeds[0],
        command=json.loads(run.settings.read_text())["command"],
        worlds=learned.acceptance_worlds,
        workloads="\n".join(f"- `{name}`" for name in learned.workloads),
        pairs=", ".join(HELD_OUT_PAIRS),
        classes=", ".join(HELD_OUT_CLASSES),
        batches=", ".join(map(str, HELD_OUT_BATCH_SIZES)),
        temperatures=", ".join(map(str, HELD_OUT_TEMPERATURES)),
        verdict=transfer.verdict(),
        tables=tables,
    )
    page = between(PAGE.read_text(), "worlds", f"{tables}\n\n{transfer.verdict()}")
    if settings.live is not None:
        page = between(page, "live", settings.live.read_text().strip())
    for path, text in ((folder / "README.md", card), (PAGE, page)):
        with replacing(path) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    ship(tyro.cli(Settings, prog="python -m recipes.tuner", description=__doc__))
