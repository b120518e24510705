"""Runs an example with LipNeXts of so few blocks: run by test_examples.

python shallow.py DEPTH SCRIPT [arguments of the script]
"""

import functools
import pathlib
import runpy
import sys

import keras_lipnext as lip

if __name__ == "__main__":
    depth, script = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(script.parent))
    lip.LipNeXt = functools.partial(lip.LipNeXt, depth=depth)
    runpy.run_path(str(script), run_name="__main__")
