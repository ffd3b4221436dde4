"""The programs in `tpu/`, a folder that is no package, for the tests of it: importing this makes them importable."""

import pathlib
import sys

TPU = pathlib.Path(__file__).parent.parent / "tpu"
sys.path.insert(0, str(TPU))
