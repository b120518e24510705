"""The states of the callbacks that stand beside a checkpoint: read, kept and given back.

A callback's state is what has changed in its attributes since training began, as far as it is
plain: None, numbers, text, NumPy arrays, variables, and lists, tuples and dictionaries of them.
Keras' own callbacks hold nothing else that training depends on.
"""

import hashlib
import io
import itertools
import json
import sys

import keras
import numpy as np

# Attributes that a callback makes anew by itself, Keras' among them.
DERIVED = {
    "Callback": {"_model", "params"},
    "MonitorCallback": {"monitor_op", "min_delta"},
    "CSVLogger": {"csv_file", "writer"},
    "TensorBoard": {
        "_batch_trace_context",
        "_epoch_start_time",
        "_prev_summary_state",
        "_summary_module",
        "_writers",
    },
}


def list_that_calls(callback):
    """The `keras.callbacks.CallbackList` that is calling this callback; None if none does.

    Keras tells a callback its model, and nothing of the callbacks beside it: they are read off
    the caller.
    """
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList) and any(
            member is callback for member in caller.callbacks
        ):
            return caller
        frame = frame.f_back
    return None


class States:
    """What the attributes of some callbacks are when training begins, and what becomes of them.

    Args:
        callbacks: List of callbacks whose `on_train_begin` has been called.
    """

    def __init__(self, callbacks):
        self._callbacks = dict(zip(_names(callbacks), callbacks))
        self._fresh = {name: _prints(c) for name, c in self._callbacks.items()}

    def to_bytes(self, stopped):
        """The states now, as one file; `stopped` is whether one of them has ended the training."""
        arrays, content = [], {"stopped": stopped, "callbacks": {}}
        for name, callback in self._callbacks.items():
            fresh, changed, lost = self._fresh[name], {}, []
            now = _prints(callback)
            for key, value in _attributes(callback).items():
                if now[key] is None:
                    if not _is_code(value):
                        lost.append(key)
                elif now[key] != fresh.get(key):
                    changed[key] = _packed(value, lambda a: arrays.append(a) or len(arrays) - 1)
            settings = {k: v for k, v in fresh.items() if k not in changed}
            content["callbacks"][name] = {
                "state": changed,
                "lost": lost,
                "settings": _digest(json.dumps(settings, sort_keys=True).encode()),
            }
        file = io.BytesIO()
        text = json.dumps(content).encode()
        raw = [np.frombuffer(a.tobytes(), "uint8") for a in arrays]
        np.savez(file, *raw, content=np.frombuffer(text, "uint8"))
        return file.getvalue()

    def restore(self, file):
        """Gives the callbacks their states of a file back.

        Returns:
            (stopped, begun anew): whether the training had been ended by one of these callbacks,
            as they are set now, and a list of words, of what could not be given back.
        """
        with np.load(io.BytesIO(file)) as arrays:
            content = json.loads(arrays["content"].tobytes())
            entries, anew, same = content["callbacks"], [], True
            for name, callback in self._callbacks.items():
                if name not in entries:
                    same = False
                    continue
                entry = entries[name]
                for key, value in entry["state"].items():
                    value = _unpacked(value, arrays)
                    variable = vars(callback).get(key)
                    if _is_variable(variable):
                        variable.assign(value)
                    else:
                        setattr(callback, key, value)
                if entry["lost"]:
                    anew.append(f"{name} (in {', '.join(entry['lost'])})")
                fresh = self._fresh[name]
                settings = {k: v for k, v in fresh.items() if k not in entry["state"]}
                digest = _digest(json.dumps(settings, sort_keys=True).encode())
                same = same and digest == entry["settings"]
        gone = set(entries) - set(self._callbacks)
        # One that was added begins as it would have; not so one that was changed or moved.
        anew += [
            f"{name} (there was {before})"
            for name in sorted(set(self._callbacks) - set(entries))
            for before in sorted(gone)
            if _kind(before) == _kind(name) and entries[before]["state"]
        ]
        return content["stopped"] and same and not gone, anew


def _names(callbacks):
    """A name for each: the class, and what tells two of the same class apart.

    Two that nothing tells apart are numbered, among how many there are: were one of them left out
    later, neither would be mistaken for the other.
    """
    plain = []
    for callback in callbacks:
        marks = [getattr(callback, key, None) for key in ("monitor", "filepath")]
        marks = [repr(mark) for mark in marks if isinstance(mark, str)]
        plain.append(" ".join([type(callback).__name__, *marks]))
    seen = {name: itertools.count(1) for name in plain}
    counts = {name: plain.count(name) for name in plain}
    return [n if counts[n] == 1 else f"{n} {next(seen[n])} of {counts[n]}" for n in plain]


def _kind(name):
    """The class of a name."""
    return name.split()[0]


def _attributes(callback):
    derived = set().union(*(DERIVED.get(c.__name__, ()) for c in type(callback).__mro__))
    return {key: value for key, value in vars(callback).items() if key not in derived}


def _prints(callback):
    """Attribute -> a digest of its value, None if the value is not plain."""
    digests = {}
    for key, value in _attributes(callback).items():
        try:
            packed = _packed(value, lambda a: _digest(np.ascontiguousarray(a)))
            digests[key] = _digest(json.dumps(packed).encode())
        except (TypeError, RecursionError):
            digests[key] = None
    return digests


def _digest(data):
    return hashlib.sha256(data).hexdigest()


def _is_code(value):
    """Whether it is called rather than kept: a function, say. What it remembers is its own."""
    return callable(value) and not isinstance(value, (keras.Layer, keras.Metric))


def _is_variable(value):
    """Of Keras, or of TensorFlow."""
    return callable(getattr(value, "assign", None)) and callable(getattr(value, "numpy", None))


def _packed(value, keep):
    """`value` as JSON has it, `keep(array)` in place of each array.

    Raises:
        TypeError: if it is not plain.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if _is_variable(value):
        value = keras.ops.convert_to_numpy(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind not in "OSU":
        array = {"array": keep(value), "dtype": value.dtype.name, "shape": value.shape}
        return {**array, "scalar": isinstance(value, np.generic)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(member, keep) for member in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _packed(member, keep) for key, member in value.items()}}
    raise TypeError(f"{type(value).__name__} is not plain")


def _unpacked(value, arrays):
    """Undoes `_packed`, whose `keep` gave the numbers of arrays."""
    if not isinstance(value, dict):
        return value
    if "array" in value:
        raw = arrays[f"arr_{value['array']}"].tobytes()
        array = np.frombuffer(raw, value["dtype"]).reshape(value["shape"]).copy()
        return array[()] if value["scalar"] else array
    if "dict" in value:
        return {key: _unpacked(member, arrays) for key, member in value["dict"].items()}
    ((kind, members),) = value.items()
    members = [_unpacked(member, arrays) for member in members]
    return tuple(members) if kind == "tuple" else members
