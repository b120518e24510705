"""Figures of the pages, read from benchmarks/results and docs/gallery: none is typed.

`{{ name }}` in a page stands for what the function `name` below answers, as Markdown: a table, a
number, a text. A name that is not below stops the build.
"""

import ast
import json
import pathlib
import re
import statistics

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GALLERY = ROOT / "docs" / "gallery"
BACKENDS = {"jax": "JAX", "torch": "PyTorch", "tensorflow": "TensorFlow"}
FIGURES = {}


def figure(function):
    FIGURES[function.__name__] = function
    return function


def filled(text):
    """The page with its figures in the places that name them."""

    def value(match):
        if match[1] not in FIGURES:
            raise KeyError(f"docs/_build/figures.py has no figure {match[0]}.")
        return FIGURES[match[1]]()

    return re.sub(r"\{\{ (\w+) \}\}", value, text)


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(heads, rows):
    """Markdown; columns whose heads are padded on the left are numbers."""
    lines = [heads, ["---:" if head.startswith(" ") else "---" for head in heads], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def share(value, digits=1):
    return f"{100 * value:.{digits}f} %"


def short(value, digits=2):
    """A number to so many significant digits, in plain notation where that is short."""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if 1e3 <= abs(value) < 1e7 else text


def span(values, digits=2):
    low, high = min(values), max(values)
    same = f"{low:.{digits}f}" == f"{high:.{digits}f}"
    return f"{low:.{digits}f}" if same else f"{low:.{digits}f} to {high:.{digits}f}"


def machine(name):
    """Where a result was measured."""
    of = results(name)["machine"]
    load = f", load {of['load']}" if "load" in of else ""
    return f"{of['cores']} cores{load}"


# Soundness and certificates


@figure
def soundness():
    rows = []
    for backend, name in BACKENDS.items():
        of = results(f"soundness_{backend}")
        orders = results(f"soundness_orders_{backend}")
        rows.append(
            (
                name,
                f"{of['nets']:,}",
                f"{of['certified_samples']:,}",
                len(of["violations"]),
                f"{orders['nets']:,}",
                f"{orders['certified_in_float32']:,}",
                len(orders["violations"]),
            )
        )
    heads = ["backend", " networks", " certified samples", " false ones"]
    return table([*heads, " networks, float32", " certified samples", " false ones"], rows)


@figure
def arithmetic():
    rows = [
        (
            of["network"],
            short(of["median_radius"]),
            f"{100 * of['relative_loss_float64']:.0e} %",
            share(of["relative_loss_float32"]) if "relative_loss_float32" in of else "refused",
            f"{of['time_float32']:.2f}" if "time_float32" in of else "",
        )
        for of in results("arithmetic")["rows"]
    ]
    heads = ["network", " median radius", " lost by float64", " lost by float32"]
    return table([*heads, " time over that of real"], rows)


@figure
def ordinary_networks():
    rows = [
        (
            of["network"],
            f"{of['size']} x {of['size']}",
            f"{of['parameters'] / 1e6:.1f} M",
            f"{of['bound']:.2g}" if "bound" in of else "refused",
            of["cpu_seconds"],
            f"{of['peak_gib']:.2f}",
        )
        for of in results("ordinary_networks")["networks"]
    ]
    return table(["network", "images", " weights", " bound", " CPU seconds", " GiB at most"], rows)


@figure
def norms():
    rows = [
        (
            f"{of['n']} x {of['n']}",
            f"{of['median_ratio']:.2f}",
            f"{of['largest_excess']:.0e}",
        )
        for of in results("norms")["against_svd"]
    ]
    return table(["matrix", " time over the SVD's", " above the norm by at most"], rows)


@figure
def constants():
    rows = []
    for size in ("base", "1b"):
        of = results(f"constants_{size}")
        memory = of["peak_gib"] - of["peak_gib_before"]
        rows.append(
            (
                size,
                f"{of['parameters'] / 1e6:.0f} M",
                of["seconds"],
                of["seconds_again"],
                f"{memory:.1f} GiB",
                f"{of['K']:.6f}",
            )
        )
    heads = ["size", " parameters", " seconds", " seconds again", " memory beside the model"]
    return table([*heads, " K"], rows)


@figure
def certify_speed():
    rows = [(BACKENDS[of["backend"]], of["ratio"]) for of in results("certify_speed")["rows"]]
    return table(["backend", " certify over predict, both in float64"], rows)


# Training


@figure
def step_time():
    """Ratios of whole steps where products decide: wide layers and many tokens."""
    rows = []
    every = results("step_time")["rows"]
    large = [of for of in every if of["width"] >= 512 and of["tokens"] >= 8 * of["width"]]
    names = list(large[0]["ratios"])
    for name in names[:5]:
        cells = []
        for backend in ("jax", "torch"):
            mine = [of["ratios"][name]["median"] for of in large if of["backend"] == backend]
            cells.append(span(mine))
        rows.append((name, *cells))
    return table(["a step of / a step of", " JAX", " PyTorch"], rows)


@figure
def orthogonal_layers():
    found = results("orthogonal_layers")
    heads = ["kept orthogonal by", *(f" {of['d']}, {of['tokens']:,}" for of in found["sizes"])]
    rows = []
    for name, products in found["c"].items():
        cells = []
        for size in found["sizes"]:
            of = size["methods"].get(name, {})
            cells.append(f"{of['ratio_to_ours']['median']:.2f}" if "ratio_to_ours" in of else "")
        defect = found["defects"].get(name)
        rows.append((name, *cells, f"{products:.1f}", f"{defect:.0e}" if defect else ""))
    return table([*heads, " products", " defect"], rows)


def products(name):
    return f"{results('orthogonal_layers')['c'][name]:.0f}"


@figure
def products_muon():
    return products("ours, ManifoldMuon")


@figure
def products_adam():
    return products("ours, ManifoldAdam")


@figure
def products_keras():
    return products("ours, Keras' Adam and projection")


@figure
def retractions():
    rows = [
        (
            of["candidate"].replace("_", " "),
            *(f"{value:.1f}" for value in of["products"].values()),
            f"{of['error']:.0e}",
            f"{of['defect']:.0e}",
        )
        for of in results("retractions_torch")["results"]
    ]
    heads = ["retraction", " products", " error against the exponential"]
    return table([*heads, " defect after 10,000 steps"], rows)


@figure
def shifts():
    rows = []
    for backend, name in BACKENDS.items():
        mine = [100 * (of["library"] - 1) for of in results(f"shifts_{backend}")["rows"]]
        rows.append((name, f"{statistics.median(mine):.0f} %", f"{max(mine):.0f} %"))
    return table(["backend", " the shift adds, median", " at most"], rows)


@figure
def block_forms():
    rows = []
    for path in sorted(RESULTS.glob("block_forms_*.json")):
        name, device = path.stem.removeprefix("block_forms_").split("_", 1)
        for of in json.loads(path.read_text())["rows"]:
            passes = [of[form].get("passes", "") for form in ("parts", "expanded")]
            where = (BACKENDS[name], device.replace("_", " "), of["width"])
            rows.append((*where, *passes, of["expanded"]["ratio"]))
    heads = ["backend", "device", " width", " passes, parts in order", " expanded", " time"]
    return table(heads, rows)


@figure
def gpu_passes():
    rows = []
    versions = results("gpu_passes")["passes"]
    for name in sorted(versions, key="now".__eq__):
        for of in versions[name]:
            moved = [of[form][kind] for form in ("parts", "expanded") for kind in of[form]]
            dtype = {"mixed_bfloat16": "bfloat16"}.get(of["dtype"], of["dtype"])
            rows.append((name, of["width"], dtype, *(f"{passes:.1f}" for passes in moved)))
    heads = ["version", " width", "dtype", " parts: products", " others"]
    return table([*heads, " expanded: products", " others"], rows)


@figure
def gpu_memory():
    rows = [
        (of["case"], of["batch"], f"{of['planned_gb']:.1f} GB", f"{of['estimated_gb']:.1f} GB")
        for of in results("gpu_passes")["memory"]
    ]
    return table(["network", " batch", " XLA's plan", " estimate"], rows)


@figure
def symmetric_products():
    rows = []
    for path in sorted(RESULTS.glob("symmetric_products_*.json")):
        device = path.stem.removeprefix("symmetric_products_").replace("_", " ")
        for of in json.loads(path.read_text())["milliseconds"]:
            stack = f"{of['batch']} of {of['n']} x {of['n']}, {of['dtype']}"
            rows.append((device, stack, *(of[way] for way in ("whole", "rows", "stack"))))
    heads = ["device", "matrices", " ms, whole", " three of four blocks", " the same, as one stack"]
    return table(heads, rows)


@figure
def fit_overhead():
    rows = [
        (*of["network"].split("/"), f"{1e3 * of['loop_step_seconds']:.0f}", of["ratio"]["median"])
        for of in results("fit_overhead")["rows"]
    ]
    heads = [" blocks", " width", " batch", " ms a step of the loop", " fit over the loop"]
    return table(heads, rows)


@figure
def startup():
    found = results("startup")["rows"]
    depths = list(dict.fromkeys(of["depth"] for of in found))
    rows = []
    for backend in ("jax", "tensorflow"):
        for form, name in (("ours", "LipNeXt"), ("plain", "the same with Keras' Adam")):
            seconds = {
                of["depth"]: of["first_step_seconds"]
                for of in found
                if (of["backend"], of["form"]) == (backend, form)
            }
            cells = (f"{seconds[depth]:.0f}" if depth in seconds else "" for depth in depths)
            rows.append((f"{BACKENDS[backend]}, {name}", *cells))
    return table(["seconds to the first step", *(f" {depth}" for depth in depths)], rows)


@figure
def convergence():
    rows = []
    for name, seeds in results("convergence")["curves"].items():
        ends = [curve[-1] for curve in seeds]
        rows.append(
            (
                name,
                *(share(statistics.mean(e[k] for e in ends)) for k in ("clean", "cra")),
                f"{statistics.mean(e['seconds'] for e in ends):.0f}",
            )
        )
    return table(["optimizer", " clean", " CRA(36/255)", " seconds"], rows)


@figure
def longest_training():
    """Which model of results/ took longest to train, and how long."""
    longest = max(_certified_models(), key=lambda of: of["training_seconds"])
    return f"`{longest['model']}` {longest['training_seconds'] / 60:.0f} minutes"


@figure
def presets():
    """Every file of results/, which names a certified model."""
    rows = []
    for of in _certified_models():
        certified = "; ".join(
            f"{share(v)} at {_radius(e)}" for e, v in of["certified_accuracy"].items()
        )
        left = "; ".join(
            f"{share(of['attacked_certified'][e], 0)}, {share(v, 0)} at {_radius(e)}"
            for e, v in of["attacked_accuracy"].items()
        )
        size = f"{of['parameters'] / 1e3:,.0f} k"
        rows.append(
            (
                f"`{of['model']}`",
                of["data_name"],
                size,
                share(of["clean_accuracy"]),
                certified,
                left,
            )
        )
    heads = ["preset", "data", " weights", " clean", "certified (CRA)", "of 100: CRA, left by attacks"]
    return table(heads, rows)


def readme():
    """README's table: what is certified of the presets, and the most that others published."""
    others = json.loads((ROOT / "results" / "published.json").read_text())["rows"]
    rows = []
    for of in _certified_models():
        best = {}
        for other in (o for o in others if of["data_name"].startswith(o["data"])):
            radius = _radius(other["epsilon"])
            if other["cra"] > best.get(radius, (0,))[0]:
                best[radius] = other["cra"], f"{other['cra']:.1f} % at {radius} ({other['method']})"
        certified = "; ".join(
            f"{share(v)} at {_radius(e)}" for e, v in of["certified_accuracy"].items()
        )
        theirs = "; ".join(text for _, text in best.values())
        clean = share(of["clean_accuracy"])
        rows.append((f"`{of['model']}`", of["data_name"], clean, certified, theirs))
    return table(["preset", "test data", " clean", "CRA", "most published"], rows)


def _certified_models():
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*.json"))]
    return [of for of in found if "certified_accuracy" in of]


@figure
def published():
    found = json.loads((ROOT / "results" / "published.json").read_text())
    rows = [
        (of["data"], _radius(of["epsilon"]), f"{of['cra']:.1f} %", of["method"], of["source"])
        for of in found["rows"]
    ]
    return table(["data", "epsilon", " CRA", "method", "source"], rows)


def _radius(epsilon):
    """As papers write it."""
    pixels = 255 * float(epsilon)
    whole = abs(pixels - round(pixels)) < 0.05 and pixels < 254
    return f"{pixels:.0f}/255" if whole else f"{float(epsilon):g}"


JPEG = "CIFAR-10 (JPEG q75 copy)"


@figure
def accuracy():
    names = {
        "patches": f"{JPEG}, width 128, patches",
        "tuned": f"{JPEG}, width 192, patches, tuned",
        "cifar10": f"{JPEG}, L2 pooling",
        "full": f"{JPEG}, L2 pooling, the paper's block",
        "mnist": "MNIST, L2 pooling",
    }
    found = results("accuracy")["results"]
    rows = []
    for task, name in names.items():
        mine = [of for of in found if of["task"] == task]
        radii = list(mine[0]["cra"])
        cells = [share(statistics.mean(of["cra"][r] for of in mine)) for r in radii]
        clean = share(statistics.mean(of["clean"] for of in mine))
        shown = [r if task == "mnist" else f"{255 * float(r):.0f}/255" for r in radii]
        rows.append((name, clean, *(f"{c} at {r}" for c, r in zip(cells, shown))))
    return table(["data and model", " clean", " CRA", " CRA", " CRA"], rows)


@figure
def tuned_time():
    """CPU seconds of "tuned" over those of width 256 with L2 pooling, on held-out runs."""
    lines = map(json.loads, (RESULTS / "tuning.jsonl").read_text().splitlines())
    of = {json.dumps(line["settings"], sort_keys=True): line.get("cpu_seconds") for line in lines}
    common = {"depth": 4, "patch_size": 4, "shift_ratio": 1 / 16, "temperature": 4, "batch": 128}
    pooled = common | {"neck": "pool", "width": 256}
    tuned = common | {"neck": "patches", "width": 192, "neck_width": 384, "beta": 0.5}
    emma = {"class": "EMMA", "epsilon": 3 * 36 / 255, "temperature": 4, "ramp": 0.25}
    tuned["loss"] = emma
    longer, shorter = (of[json.dumps(one, sort_keys=True)] for one in (tuned, pooled))
    return f"{longer / shorter:.2f}"


@figure
def bfloat16():
    rows = []
    for of in results("bfloat16")["differences"]:
        points = of["points"]
        worst = max(abs(v) for k, v in points.items() if k != "clean")
        clean = f"{abs(points['clean']):.1f}"
        rows.append((BACKENDS[of["backend"]], clean, f"{worst:.1f}", of["loss_ratio"]))
    heads = ["backend", " points of clean accuracy", " points of CRA at most"]
    return table([*heads, " loss over float32's"], rows)


OF_255 = {"0.141": "36/255", "0.282": "72/255", "0.424": "108/255"}


def ablation(group):
    rows = results("ablations")["groups"][group]
    cells = [
        (
            of["name"],
            of["seeds"],
            f"{of['cpu_seconds']:,.0f}",
            *(share(v) for v in (of["clean"], *of["cra"].values())),
        )
        for of in rows
    ]
    radii = [f" CRA({OF_255.get(r) or f'{float(r):g}'})" for r in rows[0]["cra"]]
    return table(["", " seeds", " CPU seconds", " clean", *radii], cells)


@figure
def necks():
    groups = [group for group in results("ablations")["groups"] if group.startswith("neck")]
    return "\n\n".join(ablation(group) for group in groups)


@figure
def ablations():
    groups = [group for group in results("ablations")["groups"] if not group.startswith("neck")]
    return "\n\n".join(f"**{group.capitalize()}**\n\n{ablation(group)}" for group in groups)


# Sizes, memory, devices


@figure
def build_1b():
    rows = [
        (BACKENDS[of["backend"]], of["seconds"], f"{of['peak_gib']:.1f}")
        for of in results("build_1b")["rows"]
    ]
    return table(["backend", " seconds", " GiB at most"], rows)


CASES = {"plain": "plain", "remat": "`remat=True`", "accumulate": "in 4 parts"}


@figure
def memory():
    found = results("memory")["rows"]
    cases = list(dict.fromkeys(of["case"] for of in found))
    rows = []
    for depth in sorted({of["depth"] for of in found}, reverse=True):
        for backend, name in BACKENDS.items():
            mine = {
                of["case"]: f"{of['peak_mib']} ({of['seconds']:.2f})"
                for of in found
                if (of["backend"], of["depth"]) == (backend, depth)
            }
            rows.append((f"{name}, {depth} blocks", *(mine[case] for case in cases)))
    return table(["MiB (seconds a step)", *(f" {CASES[case]}" for case in cases)], rows)


@figure
def sharding():
    found = results("sharding")["rows"]
    of_mesh = [" {} x {}".format(*of["mesh"]) for of in found]
    given = [f"{of['given_bytes'] / 2**20:.1f}" for of in found]
    peak = [f"{(of['given_bytes'] + of['temporary_bytes']) / 2**20:.1f}" for of in found]
    rows = [("weights and moments", *given), ("peak", *peak)]
    return table(["MiB of one device; data x model devices", *of_mesh], rows)


@figure
def pipeline():
    rows = []
    for of in results("pipeline")["rows"]:
        size, side, batch = of["network"].split("/")
        speeds = of["images_per_second"].values()
        rows.append((f"{size}, {side} x {side}, batches of {batch}", *map(short_speed, speeds)))
    heads = ["network", " a training step", " read alone", " cropped, flipped", " with RandAugment"]
    return table(heads, rows)


def short_speed(value):
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


@figure
def gpu_certificate():
    """How far certificates of one model on a card are from those on a CPU."""
    found = results("gpu_certificate")
    rows = [of for of in found["differences"] if "cpu" not in of["with"]]
    assert all(of["hash and predictions"] == "same" for of in rows)
    worst = max(max(of["radii"], of["constant"], of["body_constant"]) for of in rows)
    devices = ", ".join(sorted({of["with"] for of in rows}))
    return f"{short(worst)} of themselves or of 1 ({devices}, against {found['reference']})"


@figure
def rounded_products():
    found = results("rounded_products")["rows"]
    radii = list(found[0]["cra"])
    rows = []
    for rounding, name in ((False, "float32"), (True, "rounded as a card would")):
        mine = [of for of in found if of["rounded"] == rounding]
        certified = []
        for radius in radii:
            values = [of["cra"][radius] for of in mine]
            certified.append(f"{share(statistics.mean(values))} ({span([100 * v for v in values], 1)})")
        worst = (max(of[key] for of in mine) for key in ("defect", "excess_of_32_kernels"))
        rows.append((name, *certified, *map(short, worst)))
    heads = (f" CRA({radius})" for radius in radii)
    return table(["products", *heads, " defect", " K - 1 of 32 kernels"], rows)


@figure
def gpu():
    """A table a card: training steps on each backend that was measured."""
    text = []
    for path in sorted(RESULTS.glob("gpu_*.json")):
        found = json.loads(path.read_text())
        if not set(found) & set(BACKENDS):  # of another script
            continue
        rows = []
        for backend, name in BACKENDS.items():
            of_backend = found.get(backend, {"rows": []})
            ends = {of["case"]: of["K_minus_1"] for of in of_backend["rows"] if "K_minus_1" in of}
            for of in of_backend["rows"]:
                if "variant" not in of:
                    continue
                whole = of["variant"] == "step"
                share_of = of_backend["shares"].get(of["case"], {}).get("optimizer_share")
                rows.append(
                    (
                        f"{name}, {of['case']}",
                        VARIANTS.get(of["variant"], of["variant"]),
                        f"{of['first_step_seconds']:.1f} s",
                        f"{of['milliseconds']:.1f} ms",
                        f"{of['images_a_second']:,}",
                        f"{of['peak_gb']:.1f} GB ({of['estimated_gb']:.1f})",
                        share(of["tflops"] / of_backend["rates"]["bfloat16"][0], 0),
                        share(share_of, 0) if whole and share_of is not None else "",
                        f"{ends[of['case']]:.1e}" if whole and of["case"] in ends else "",
                    )
                )
        heads = ["blocks x width", "what", " the first", " a step", " images a second", " peak (estimate)"]
        heads += [" of the card's rate", " optimizer's share", " K - 1 after 50 steps"]
        card = next(found[b]["card"] for b in BACKENDS if b in found)
        text += [f"One {card}:", "", table(heads, rows), ""]
    return "\n".join(text)


VARIANTS = {
    "step": "training step",
    "full mixing": "training step, the paper's full mixing",
    "Adam": "training step, Keras' Adam, no constraint",
}


# Matrix inequalities

METHODS = {
    "lipsdp": "LipSDP",
    "eclipse": "ECLipsE",
    "eclipse_fast": "ECLipsE-Fast",
    "eclipse_diagonal": "ECLipsE-Diagonal",
    "local_lipschitz": "local",
    "product": "product of norms",
}


def lmi_table(kind):
    found = results("lmi_bounds")[kind]
    methods = list(dict.fromkeys(of["method"] for of in found))
    cells = {(of["depth"], of["width"], of["method"]): of for of in found}
    rows = []
    for depth, width in sorted({(of["depth"], of["width"]) for of in found}):
        row = [f"{depth} hidden layers of {width}"]
        for method in methods:
            of = cells.get((depth, width, method), {})
            row.append(
                f"{short(of['bound_over_product'])}, {of['seconds']:.2g} s, "
                f"{1024 * of['peak_gib']:.0f} MiB"
                if "bound_over_product" in of
                else "over a minute"
            )
        rows.append(row)
    return table(["network", *(f" {METHODS[method]}" for method in methods)], rows)


@figure
def lmi_width():
    return lmi_table("width")


@figure
def lmi_depth():
    return lmi_table("depth")


@figure
def local_bounds():
    found = results("local_bounds")["networks"]
    methods = list(found[0]["bounds"])
    rows = []
    for of in found:
        cells = [
            f"{of['bounds'][m]['median_radius']:.2f}: "
            f"{share(of['bounds'][m]['cra']['0.3'], 0)}, {share(of['bounds'][m]['cra']['0.5'], 0)}"
            for m in methods
        ]
        attack = f"{share(of['attack']['0.3'], 0)}, {share(of['attack']['0.5'], 0)}"
        seconds = f"{of['bounds']['local_lipschitz']['seconds_a_sample']:.2f}"
        rows.append((of["network"], *cells, seconds, attack))
    heads = ["network", *(f" {METHODS[method]}" for method in methods)]
    return table([*heads, " seconds a sample, local", " what an attack leaves"], rows)


@figure
def rs_lmi():
    rows = []
    for of in results("rs_lmi")["rows"]:
        target = "" if of["target"] is None else f", L = {of['target']:g}"
        rows.append(
            (
                of["method"].replace("spectral", "spectral penalty") + target,
                share(of["clean"]),
                f"{of['bound']:.2f}",
                share(of["cra"]["0.1"]),
                share(of["cra"]["0.3"]),
                of["seconds"],
                of["mib"],
            )
        )
    heads = ["training", " clean", " proven bound", " CRA(0.1)", " CRA(0.3)", " seconds", " MiB"]
    return table(heads, rows)


@figure
def rs_lmi_steps():
    found = results("rs_lmi")["steps"]
    names = [name for name in found[0]["ratios"] if name != "plain"]
    rows = []
    for name in names:
        medians = [of["ratios"].get(name, {}).get("median") for of in found]
        rows.append((name, *("" if m is None else f"{m:.1f}" for m in medians)))
    heads = [f" width {of['width']}" for of in found]
    return table(["a step over a plain one's time", *heads], rows)


# What the examples printed, as docs/_build/gallery.py left it


@figure
def gallery():
    """A section an example: its first paragraph, its picture, what it printed."""
    text = []
    for path in sorted(GALLERY.glob("*.txt")):
        example = (ROOT / "examples" / f"{path.stem}.py").read_text()
        picture = path.with_suffix(".png")
        title = ast.get_docstring(ast.parse(example)).split("\n\n")[0]
        text += [f"## {path.stem}", "", f"`examples/{path.stem}.py`: {title}", ""]
        if picture.exists():
            text += [f"![The picture that {path.stem}.py writes](gallery/{picture.name})", ""]
        text += ["```text", path.read_text().rstrip(), "```", ""]
    return "\n".join(text)


@figure
def cli():
    """Each command's help, as tests/test_cli.py holds the command to it."""
    texts = [path.read_text().rstrip() for path in sorted((ROOT / "docs" / "cli").glob("*.txt"))]
    return "\n\n".join(f"```text\n{text}\n```" for text in texts)
