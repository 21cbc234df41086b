"""Draw docs/tokens.svg, the README's picture: one text, its tokens coloured by where they come from.

With the package installed: ``python docs/picture.py``. The text is what the shipped pair `tiny` writes, live.
"""

import io
import re
from pathlib import Path

import gymnasium
from rich.console import Console
from rich.text import Text

import specgym  # noqa: F401  # registers the environments

env = gymnasium.make("specgym/Speculative-v0", workload="tiny/prose", render_mode="ansi", start="default")
env.reset(seed=3, options={"prompt": 2})
env.step(0 * env.action_space.sample())  # an action of zeros leaves the default draft length
console = Console(record=True, width=100, file=io.StringIO())
console.print(Text.from_ansi(str(env.render())))
drawn = console.export_svg(title="specgym/Speculative-v0 on tiny/prose")
drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # fonts from the network; any monospace one does
Path(__file__).with_name("tokens.svg").write_text(drawn, encoding="utf-8")
