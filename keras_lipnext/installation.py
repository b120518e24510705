"""What is installed: the backend that Keras is to compute with, and how to install an extra.

Keras imports its backend when it is itself imported, and ends in a long traceback if that is not
installed. So the package imports this module first, which looks before Keras does.
"""

import importlib.util
import json
import os
import pathlib
import sys

BACKENDS = ("jax", "tensorflow", "torch")


def installing(extra):
    """How to install an extra of this package, from an index or from a copy of the repository."""
    return f"pip install 'keras_lipnext[{extra}]' (in the repository: pip install -e '.[{extra}]')"


def configured():
    """Name of the backend that Keras will take: the variable's, its file's, or TensorFlow."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name
    home = os.environ.get("KERAS_HOME") or pathlib.Path.home() / ".keras"
    try:
        return json.loads(pathlib.Path(home, "keras.json").read_text())["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow"


def is_command():
    """Whether the process is the command `lipnext`, or `python -m keras_lipnext`."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1 : words.index("-m") + 2] if "-m" in words else []
    return module == ["keras_lipnext"] or pathlib.Path(sys.argv[0]).stem == "lipnext"


def ensure_backend():
    """Looks whether the backend is installed. The command takes another if none was named.

    Raises:
        ImportError: in one line that names those which are installed and what to type.
        SystemExit: likewise, from the command.
    """
    backend = configured()
    if "keras" in sys.modules or backend not in BACKENDS or _is_installed(backend):
        return
    installed = [name for name in BACKENDS if _is_installed(name)]
    if installed and is_command() and not os.environ.get("KERAS_BACKEND"):
        os.environ["KERAS_BACKEND"] = installed[0]
        return
    if installed:
        way_out = f"Installed: {', '.join(installed)}. Type: export KERAS_BACKEND={installed[0]}"
    else:
        way_out = f"Nor is {' or '.join(n for n in BACKENDS if n != backend)}. {installing('jax')}"
    message = f"Keras is to compute with {backend}, which is not installed. {way_out}"
    if is_command():
        raise SystemExit(f"lipnext: error: {message}")
    raise ImportError(message)


def _is_installed(package):
    return importlib.util.find_spec(package) is not None


ensure_backend()
