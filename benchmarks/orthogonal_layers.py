"""What keeping matrices orthogonal costs on PyTorch, ours and the peers' ways.

    pip install --constraint constraints.txt -e '.[benchmarks]'
    python benchmarks/orthogonal_layers.py
    python benchmarks/orthogonal_layers.py --sizes 64/64 --rounds 16 --steps 20     # quick

Peers: torch's parametrizations, orthogonium, deel-torchlip, geoopt, an SLL block; baselines: plain
layers with Adam (orthogonal_peers.py has the networks). Learning rate 1e-3, float32.

- Time of a full training step, all methods in turns in one process (measuring.py). c is the cost of
  orthogonality in products of d x d matrices a step and layer: a plain step takes 3 N of these
  over d, so ratio = 1 + c d / (3 N), fitted over the sizes by least squares. The baseline of our
  layers' c is Keras' Dense and Adam, of the others' Linear and torch's Adam; ratios of time are
  all to the latter.
- Memory: peak of three steps less what was resident before, each method in its own process.
- Defect: max |W^T W - I| after training on noise, at a width of its own.

Writes results/orthogonal_layers.json and .png.

Not shown: how well the methods train, accelerators, torch.compile, convolutions, larger learning
rates (ours costs more where the step is long, deel-torchlip iterates to a tolerance). An SLL block
has a nonlinearity of its own and two products per token: its ratio is not the price of
orthogonality. c counts what takes time, element-wise work and overheads too, as products.
"""

import json

import measuring

PEERS = ("torch", "orthogonium", "deel-torchlip", "geoopt")


def working(blocks, d, tokens):
    """({name: step}, {name: error}) of the methods that run and those that do not."""
    from orthogonal_peers import METHODS, step

    steps, errors = {}, {}
    for name in METHODS:
        try:
            steps[name] = step(name, blocks, d, tokens)
        except Exception as error:  # a peer's package is missing, or not up to this torch
            errors[name] = f"{type(error).__name__}: {error}"
    return steps, errors


def time(arguments, d, tokens):
    from orthogonal_peers import METHODS, OURS, PLAIN, PLAIN_KERAS

    from keras_lipnext.optimizers.manifold_optimizer import PROJECTION_PERIOD

    steps, errors = working(arguments.blocks, d, tokens)
    timings = measuring.interleaved(
        steps,
        arguments.rounds,
        arguments.seconds,
        period=PROJECTION_PERIOD,
        sparing=[name for name in steps if not name.startswith("ours")],
    )
    rows = {}
    for name in steps:
        plain = PLAIN_KERAS if name.startswith("ours") else PLAIN
        rows[name] = {
            "seconds": round(timings.seconds(name), 5),
            "ratio": timings.ratio(name, PLAIN),
            "ratio_to_own_plain": timings.ratio(name, plain),
            "ratio_to_ours": timings.ratio(name, OURS),
        }
    return {
        "d": d,
        "tokens": tokens,
        "rounds": timings.count,
        "known": len(METHODS),
        "methods": rows,
        "errors": errors,
    }


def memory(arguments, index):
    from orthogonal_peers import METHODS, step

    name, (d, tokens) = list(METHODS)[index], arguments.sizes[0]
    try:
        step(name, 1, 16, 16)  # imports what is imported late
        measuring.forget_peak()
        before = measuring.resident_gib()
        taken = step(name, arguments.blocks, d, tokens)
        taken(), taken()
    except Exception as error:  # as in `working`; named there
        return {"method": name, "error": f"{type(error).__name__}: {error}"}
    return {"method": name, "gib": round(measuring.peak_gib() - before, 3)}


def defects(arguments):
    from orthogonal_peers import NOT_ORTHOGONAL, defect

    steps, _ = working(2, arguments.defect_width, arguments.defect_width)
    found = {}
    for name in (n for n in steps if n not in NOT_ORTHOGONAL):
        for _ in range(arguments.steps - 1):
            steps[name]()
        found[name] = defect(steps[name].matrices())
    return found


def fitted_cost(sizes, name):
    """c of ratio = 1 + c d / (3 N) by least squares over the sizes."""
    pairs = [
        (s["d"] / (3 * s["tokens"]), s["methods"][name]["ratio_to_own_plain"]["median"] - 1)
        for s in sizes
    ]
    return sum(t * r for t, r in pairs) / sum(t * t for t, _ in pairs)


def report(arguments, sizes, memories, defects):
    names = [n for n in sizes[0]["methods"] if all(n in s["methods"] for s in sizes)]
    errors = {name: error for s in sizes for name, error in s["errors"].items()}
    costs = {name: round(fitted_cost(sizes, name), 2) for name in names}
    used = {m["method"]: m["gib"] for m in memories if "gib" in m}
    content = {
        "settings": measuring.settings(arguments),
        "peers": measuring.versions(PEERS),
        "errors": errors,
        "sizes": sizes,
        "c": costs,
        "peak_gib": used,
        "defects": defects,
    }
    measuring.write("orthogonal_layers", content)
    labels = [f"{s['d']}/{s['tokens']}" for s in sizes]
    measuring.table(
        f"PyTorch, {arguments.blocks} layers d x d, time over plain Linear + Adam at d/tokens; "
        f"time over ours and memory at {labels[0]}; defect after {arguments.steps} steps at "
        f"{arguments.defect_width}",
        ["method", *labels, "over ours", "c", "MiB", "defect"],
        [
            (
                name,
                *(f"{s['methods'][name]['ratio']['median']:.2f}" for s in sizes),
                f"{sizes[0]['methods'][name]['ratio_to_ours']['median']:.2f}",
                costs[name],
                f"{1024 * used[name]:.0f}" if name in used else "",
                f"{defects[name]:.1e}" if name in defects else "",
            )
            for name in names
        ],
    )
    for name, error in errors.items():
        print(f"not measured: {name}: {error}")
    first = {name: sizes[0]["methods"][name]["ratio"]["median"] for name in names}
    measuring.figure(
        "orthogonal_layers",
        [
            [
                measuring.bars(first, f"time / plain, d/tokens {labels[0]}"),
                measuring.bars(defects, f"defect after {arguments.steps} steps"),
            ]
        ],
    )


def size(text):
    d, tokens = map(int, text.split("/"))
    return d, tokens


def measure(arguments):
    kind, *indices = arguments.child
    if kind == "time":
        return time(arguments, *arguments.sizes[int(indices[0])])
    return memory(arguments, int(indices[0])) if kind == "memory" else defects(arguments)


def main(arguments):
    def one(*what):
        return measuring.child(__file__, *what, backend="torch")[0]

    sizes = [one("time", i) for i in range(len(arguments.sizes))]
    memories = [one("memory", i) for i in range(sizes[0]["known"])]
    report(arguments, sizes, memories, one("defects"))


if __name__ == "__main__":
    parser = measuring.parser(__doc__, backends=("torch",))
    default = [(1024, 1024), (512, 1024), (512, 4096)]
    parser.add_argument("--sizes", type=size, nargs="+", default=default, help="d/tokens ...")
    parser.add_argument("--blocks", type=int, default=4, help="layers of a network (4)")
    parser.add_argument("--rounds", type=int, default=64, help="rounds of a size, at most (64)")
    parser.add_argument("--seconds", type=float, default=30, help="to stop a size after (30)")
    parser.add_argument("--steps", type=int, default=1000, help="before the defect (1000)")
    parser.add_argument("--defect-width", type=int, default=128, help="d and tokens there (128)")
    arguments = parser.parse_args()
    if arguments.child is None:
        main(arguments)
    else:
        print(json.dumps(measure(arguments)))
