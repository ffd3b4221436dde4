"""The optimizers of `examples/guides/your_own_optimizer.md`: the classes, word for word as the guide defines them."""

import pathlib
import re

GUIDE = pathlib.Path(__file__).parent.parent / "examples" / "guides" / "your_own_optimizer.md"


def code_blocks(page):
    """The Python blocks of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


DEFINITIONS = [block for block in code_blocks(GUIDE) if re.search(r"^class ", block, re.MULTILINE)]
for block in DEFINITIONS:
    exec(compile(block, GUIDE.name, "exec"), globals())
