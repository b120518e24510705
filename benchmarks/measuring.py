"""What the benchmarks share: interleaved timing, child processes, machine facts, tables, plots.

Times on a shared machine drift, so callables are timed in turns within one process, one round after
the other, and compared within a round: the figure is the median of such ratios, with quartiles. An
optimizer may do part of its work only every few steps. So a timing covers that period, or, where
steps are long, is one step, and stretches of as many rounds are compared, sliding by one round.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import time

BACKENDS = ("jax", "torch", "tensorflow")
RESULTS = pathlib.Path(__file__).with_name("results")
PACKAGES = ("keras", "numpy", "jax", "torch", "tensorflow-cpu", "tensorflow")
STATUS = pathlib.Path("/proc/self/status")
SHORTEST, LONG = 0.02, 0.2  # seconds: of one timing at least; of a period that is timed in parts
SLOW, SPARING = 2.5, 4  # beyond SLOW x the baseline, a callable may be timed SPARING x less often
LEAST = 7  # rounds


def parser(doc, backends=BACKENDS):
    """Argument parser with the options that benchmarks in child processes share."""
    answer = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if len(backends) > 1:
        answer.add_argument("--backends", nargs="+", default=list(backends), choices=backends)
    answer.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    return answer


def settings(arguments):
    return {k: v for k, v in vars(arguments).items() if k != "child"}


def child(script, *arguments, backend=None):
    """Runs `script --child arguments` with this process's options; the JSON objects it prints.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_WAIT_POLICY": "PASSIVE"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    command = [sys.executable, "-W", "ignore", script, *sys.argv[1:]]
    command += ["--child", *map(str, arguments)]
    rows = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                print(line, end="", file=sys.stderr)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return rows


def peak_gib():
    """Peak of this process's resident memory.

    Not from ru_maxrss where it can be helped: a process inherits that from the one that starts it.
    """
    if STATUS.exists():
        return _kib("VmHWM") / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def resident_gib():
    """What is resident now; elsewhere than on Linux its peak, which after imports is about it."""
    return _kib("VmRSS") / 2**20 if STATUS.exists() else peak_gib()


def forget_peak():
    """Lets the peak start anew from what is resident now, on Linux."""
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")


def _kib(field):
    return int(re.search(rf"{field}:\s*(\d+)", STATUS.read_text())[1])


def versions(names=PACKAGES):
    """{package: version} of those installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device():
    """Name of the accelerator in use, as its framework says it, or "cpu"."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0])["device_name"] if found else "cpu"


def machine():
    """Facts about this machine that the figures depend on."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    model = cpuinfo.exists() and re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())
    allowed = getattr(os, "sched_getaffinity", None)  # `taskset` gives fewer than there are
    return {
        "cores": len(allowed(0)) if allowed else os.cpu_count(),
        "cpu": model[1] if model else platform.processor(),
        "load": round(os.getloadavg()[0], 1),  # other processes may have been running
        "python": platform.python_version(),
        "versions": versions(),
    }


class Timings:
    """Seconds of callables timed in turns.

    Args:
        rounds: {name: seconds of a call in each round, None where it was left out}.
        window: Rounds of a stretch that a ratio compares.
    """

    def __init__(self, rounds, window):
        self.rounds = rounds
        self.window = window

    @property
    def count(self):
        return len(next(iter(self.rounds.values())))

    def _windows(self, name):
        times = self.rounds[name]
        for start in range(len(times) - self.window + 1):
            yield statistics.mean(t for t in times[start : start + self.window] if t is not None)

    def seconds(self, name):
        return statistics.median(self._windows(name))

    def ratio(self, name, baseline):
        """{"median", "quartiles"} of one's seconds over another's."""
        ratios = [a / b for a, b in zip(self._windows(name), self._windows(baseline))]
        low, middle, high = quartiles(ratios)
        return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def quartiles(values):
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def interleaved(calls, rounds, seconds, period=1, sparing=(), charges=None):
    """Times callables in turns, after three calls of each for compilation and warming up.

    Each must have finished its work when it returns. The order is reversed from round to round.

    Args:
        calls: {name: callable without arguments}; the first is the baseline.
        rounds: Number of rounds, at most.
        seconds: Stop earlier once they have taken so long, if there are enough for a median.
        period: Calls after which each has done the same work again.
        sparing: Names of callables of period 1, timed less often where they are slow.
        charges: {name: seconds} added to each timing, for work that is measured apart.
    """
    for call in calls.values():
        call(), call()
    first = {name: _timed(call, 1) for name, call in calls.items()}
    baseline = next(iter(first.values()))
    slow = {name for name in sparing if name in calls and first[name] > SLOW * baseline}
    in_parts = period * baseline > LONG
    repeats = 1 if in_parts else period * math.ceil(SHORTEST / (period * baseline))
    window = period if in_parts else 1
    least = max(LEAST, 3 * window // 2)
    times = {name: [] for name in calls}
    started = time.perf_counter()
    for index in range(max(rounds, least)):
        if index >= least and time.perf_counter() - started > seconds:
            break
        for name in list(calls)[:: -1 if index % 2 else 1]:
            if name in slow and window > 1 and index % SPARING:
                times[name].append(None)
                continue
            count = math.ceil(repeats / SPARING) if name in slow else repeats
            charge = (charges or {}).get(name, 0.0)
            times[name].append(_timed(calls[name], count) + charge)
    return Timings(times, window)


def _timed(call, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def table(title, header, rows):
    """Prints a Markdown table; columns after the first are numbers."""
    print(f"\n{title}, {machine()['cores']} cores\n")
    print(f"| {' | '.join(header)} |")
    print(f"| --- |{' ---: |' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def write(name, content):
    """Writes results/<name>.json, facts about the machine added."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    print(f"\n{path}")


def draw_ratios(axis, x, ratios, label):
    """A line of medians with bars from quartile to quartile."""
    medians = [r["median"] for r in ratios]
    low = [r["median"] - r["quartiles"][0] for r in ratios]
    high = [r["quartiles"][1] - r["median"] for r in ratios]
    axis.errorbar(x, medians, yerr=(low, high), marker="o", markersize=4, capsize=2, label=label)


def bars(values, title):
    """Panel of horizontal bars of {name: value}, the scale logarithmic; ours stand out."""

    def draw(axis):
        colours = ["C1" if name.startswith("ours") else "C0" for name in values]
        drawn = axis.barh(list(values), list(values.values()), color=colours)
        axis.bar_label(drawn, fmt="{:.2g}", padding=2, fontsize=8)
        axis.invert_yaxis()
        axis.set(title=title, xscale="log")
        axis.margins(x=0.2)
        axis.xaxis.set_minor_formatter("")

    return draw


def figure(name, grid):
    """Draws results/<name>.png, if the `plot` extra is installed.

    Args:
        grid: Rows of functions of one matplotlib axis, each of which draws a panel.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install -e '.[plot]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = len(grid), max(map(len, grid))
    drawing, axes = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 3.5 * rows), squeeze=False, layout="constrained"
    )
    for panels, line in zip(grid, axes):
        for panel, axis in zip(panels, line):
            panel(axis)
    drawing.savefig(RESULTS / f"{name}.png", dpi=100)
    pyplot.close(drawing)
