"""The command `lipnext`, and what reads the files it is given."""

from keras_lipnext.cli.command import main

__all__ = ["main"]
