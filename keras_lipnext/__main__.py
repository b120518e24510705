"""`python -m keras_lipnext` is the command `lipnext`."""

import sys

from keras_lipnext.cli import main

if __name__ == "__main__":
    sys.exit(main())
