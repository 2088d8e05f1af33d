"""Write the numbers that README.md and docs/*.md show:  python benchmarks/readme.py [--check]

Every block between <!-- name --> and <!-- end --> that is named below is replaced by what the tree
and benchmarks/results/*.json say. docs/results.md holds all tables of results, README.md the short
one, `results`; `map`, the list of files, and `isa` may stand in any page of docs. --check only says
whether the pages are up to date (exit code 1 if not).
"""

import ast
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = (
    "kernels",
    "diffusion",
    "harness",
    "ckpt",
    "data",
    "metrics",
    "training",
    "distillation",
    "experiments",
    "benchmarks",
)
# Scripts that have moved since something was measured with them.
MOVED = {
    "benchmarks/stages.py": "experiments/stages.py",
    "benchmarks/protocol.py": "experiments/protocol.py",
}
# Of each kernel's machine code: what is shown, and the GPUs that are not shown in full.
COUNTED = ("instructions", "in_loops", "registers", "shared", "occupancy")
ISA = ("sm_80", "sm_89", "sm_100", "gfx942")
ARMS = {
    "A": "no block losses",
    "B": "λ = w",
    "C": "λ = D's mean",
    "D": "λ by the assessor",
    "E": "by an untrained one (placebo)",
    "S": "by other blocks' (placebo)",
}


# ---- parts of a page -----------------------------------------------------------------------------


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def is_measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def commit(r: dict[str, Any]) -> str:
    return (r["commit"] or "no commit")[:9]


def machine(r: dict[str, Any]) -> str:
    m = r["machine"]
    return m["gpu"] or f"{m['cpu']}, {m['threads']} thread{'s' if m['threads'] > 1 else ''}"


def origin(r: dict[str, Any], how: str) -> str:
    """Where a result comes from, as a line of small print; how: its seeds and its spread."""
    dirty = " + uncommitted changes" if r["dirty"] else ""
    where = f"{machine(r)}; torch {r['versions']['torch']}; commit {commit(r)}{dirty}"
    return f"<sub>{command(r)}; {where}; {how}</sub>"


def command(r: dict[str, Any]) -> str:
    """What was typed, and where the script is today."""
    typed = f"`{r['command']}`"
    for old, new in MOVED.items():
        if old in typed:
            typed += f" (this script is `{new}` now)"
    return typed


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text, the others numbers."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return "\n".join([row_of(head), rule, *map(row_of, rows)])


def row_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def paragraphs(*parts: str) -> str:
    """Tables and small print as they are, other text in lines of 100 columns."""
    return "\n\n".join(p if p[0] in "|<" else wrapped(p) for p in parts if p)


def wrapped(text: str) -> str:
    if "\n" in text:  # it is made of paragraphs already
        return text
    # a line that began with the minus of "D - B" would be an item of a list
    text = text.replace(" - ", "\0-\0")
    lines = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def mean(values: list[float], form: str) -> str:
    """Their mean ± its standard error."""
    return f"{statistics.mean(values):{form}} ± {standard_error(values):.2g}"


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


# ---- the tables ----------------------------------------------------------------------------------
# Each block is a function of `up`, the way from its page to the root: "" or "../".


def block_map(up: str) -> str:
    """Every file of the product, and the first sentence of its docstring."""
    rows = []
    for folder in ("", *FOLDERS):
        for path in sorted((ROOT / folder).glob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            text = path.read_text()
            sentence = first_sentence(ast.get_docstring(ast.parse(text)) or "")
            if path.name != "__init__.py":
                rows.append([f"[{name}]({up}{name})", sentence])
    head = row_of(["file", "concept"])
    return "\n".join([head, "|---|---|", *map(row_of, rows)])


def first_sentence(doc: str) -> str:
    """Without the command that may stand behind it."""
    text = doc.split("\n\n")[0].replace("\n", " ")
    text = re.split(r"\s{2,}|(?<=[.?!])\s(?=[A-Z])", text)[0].replace("|", "\\|")
    return text.rstrip(":.")


# Of train_cpu's: diffusers in its fastest setting, which is bf16 in channels_last.
BEST = "bf16 ratio to diffusers' best"


def block_speed(up: str) -> str:
    r, default, losses = results("train_cpu"), results("default_run"), results("bf16")
    rows = [
        [
            name,
            f"{row['images/s']:.0f}",
            f"{row['ratio to diffusers']:.2f}×",
            f"{row['ratio to diffusers channels_last']:.2f}×",
            f"{row['bf16 images/s']:.0f}",
            f"{row['bf16 ratio to fp32']:.2f}×",
            f"{row[BEST]:.2f}×",
        ]
        for name, row in r["results"].items()
        if name != "loading"
    ]
    head = [
        "one training step on a CPU",
        "images/s",
        "against diffusers `UNet2DModel`",
        "… in channels_last",
        "images/s in bf16",
        "against fp32",
        "against diffusers' fastest",
    ]
    ratio = r["results"]["loading"]["ratio"]
    return paragraphs(
        table(head, rows),
        "Both sides have the same weights, inputs and optimizer. A step with real data takes "
        f"{ratio:.3f}× the time of one with a constant batch.",
        origin(r, f"seed 0; medians of {r['rounds']} alternating rounds, spread not recorded"),
        f"The default run, {default['images']:,} images in {default['dtype']}, takes "
        f"{default['seconds'] / 60:.1f} minutes from its first line to its last picture. After "
        f"{losses['images']:,} images the held-out loss in bf16 is "
        f"{mean(losses['ratios'], '.4f')} times that in fp32.",
        origin(default, "seed 0; one run"),
        origin(losses, f"{len(losses['ratios'])} seeds; ± standard error"),
    )


def block_transformer(up: str) -> str:
    r = results("transformer")
    rows = [
        [name, f"{row['images/s']:.0f}", f"{row['ratio to diffusers']:.2f}×"]
        for name, row in r["results"].items()
    ]
    head = [
        "one training step on a CPU",
        "images/s",
        "against diffusers `DiTTransformer2DModel`",
    ]
    return paragraphs(
        table(head, rows),
        "Both sides have the same weights, inputs and optimizer, and most of a step is matrix "
        "products that both do alike.",
        origin(r, f"seed 0; medians of {r['rounds']} alternating rounds, spread not recorded"),
    )


def block_text(up: str) -> str:
    r = results("text")
    rows = []
    for name, row in r["results"].items():
        for key, value in row.items():
            if key.startswith("ratio"):
                continue
            peer = next((k for k in row if k.startswith("ratio")), "")
            against = f"{row[peer]:.2f}× {peer.removeprefix('ratio to ')}" if peer else "–"
            rows.append([name, key, f"{value:,.1f}", against])
    return paragraphs(
        table(["on a CPU", "", "", "against"], rows, left=2),
        origin(r, f"seed 0; medians of {r['rounds']} alternating rounds"),
    )


def block_prompts(up: str) -> str:
    """Does a network that has read captions for six minutes draw what it is asked for?"""
    r = results("prompts")
    rows = []
    for name, key in (
        ("64 prompts of two tags", "asked"),
        ("a pair that training has seen", "together"),
        ("a pair that it has never seen together", "never together"),
    ):
        row = r[key]
        rows.append([name, f"{row['both']:.0%}", f"{row['each']:.0%}"])
    verdict = "passes" if r["passes"] else "fails"
    return paragraphs(
        table(["prompt", "both tags are read", "each of them"], rows),
        f"Asked are 80% of the first row after 6 minutes; it {verdict}. Training took "
        f"{r['minutes']:.1f} minutes; the reader is right on {r['reader']:.1%} of held-out tags.",
        origin(r, "seed 0, 64 samples a row"),
    )


def block_stages(up: str) -> str:
    r = results("stages")
    n, columns = r["samples a run"], list(r["share of samples"]["fine"])
    names = [f"`{c}` (excluded)" if c in r["excluded"] else f"`{c}`" for c in columns]
    rows = [
        [f"after `{stage}`", *(share(value, n) for value in shares.values())]
        for stage, shares in r["share of samples"].items()
    ]
    right = r["reader accuracy on real faces"]
    return paragraphs(
        table(["samples that show", *names], rows),
        f"{n} samples a run. Attributes are read back by a search for the nearest drawing, which "
        f"reads {right:.1%} of real faces right.",
        origin(r, f"one seed; ± standard errors of a share of {n}"),
    )


def share(p: float, n: int) -> str:
    return f"{p:.1%} ± {(p * (1 - p) / n) ** 0.5:.1%}"


def block_compare(up: str) -> str:
    """The verdicts on flow matching against DDPM, on toy faces."""
    return verdicts(up, "compare", "")


def block_kittens(up: str) -> str:
    """The same on robohash's kittens."""
    flags = "--data robohash --objectives D,F --images 16000,16000,4000 --n 256 --what main"
    return verdicts(up, "compare-robohash", f" {flags}")


def verdicts(up: str, name: str, flags: str) -> str:
    if not is_measured(f"{name}/verdict"):
        return "The comparison has not been run yet."
    r = results(f"{name}/verdict")
    rows = [
        [
            f"{each['key']}: {each['claim']}",
            each["word"],
            f"{each['ratio']:.3f}",
            "–" if None in each["interval"] else "{:.3f} to {:.3f}".format(*each["interval"]),
            f"{each['p']:.2g}",
            "–" if each["visible"] is None else f"{each['visible']:.1%}",
            str(each["seeds"]),
        ]
        for each in r["tests"]
    ]
    head = ["claim", "verdict", "F / D", "90% interval", "p", "visible", "seeds"]
    measures = "; ".join(f"{each['key']}, {each['measure']}" for each in r["tests"])
    folder = f"{up}benchmarks/results/{name}"
    return paragraphs(
        table(head, rows),
        f"Measured: {measures}. p is one-sided, with Holm's correction for three; visible is the "
        "change that these seeds would have shown with 80% power. [Report, with figures]"
        f"({folder}/report.md); [as one file]({folder}/report.html).",
        f"<sub>`python experiments/compare.py{flags}`; {', '.join(r['machines'])}; "
        f"commit {', '.join(r['commits'])}; seeds {', '.join(map(str, r['seeds']))}</sub>",
    )


def block_architecture(up: str) -> str:
    """U-Net against transformer, question by question."""
    if not is_measured("architecture/verdict"):
        return "The comparison has not been run yet."
    r, rows = results("architecture/verdict"), []
    for answer in r["answers"]:
        for each in answer["endpoints"]:
            low, high = each["interval"]
            rows.append([
                f"{answer['title']}: {each['what'].split(' against')[0]}",
                "–" if each["ratio"] is None else f"{each['ratio']:.3f}",
                "–" if None in (low, high) else f"{low:.3f} to {high:.3f}",
                f"{each['p']:.2g}",
                answer["word"],
            ])
    folder = f"{up}benchmarks/results/architecture"
    return paragraphs(
        table(["question", "SiT / U-Net", "90% interval", "p", "answer"], rows),
        "Below 1 the transformer is better, or what the claim says is so. p is two-sided, with "
        f"Holm's correction for all. [Report, with figures, costs and what was left out]"
        f"({folder}/report.md); [as one file]({folder}/report.html).",
        f"<sub>{', '.join(f'`{each}`' for each in r['commands'])}; {', '.join(r['machines'])}; "
        f"commit {', '.join(r['commits'])}; seeds {', '.join(map(str, r['seeds']))}</sub>",
    )


def block_answer(up: str) -> str:
    """The same in three lines."""
    r = results("compare/verdict")
    names = {"H1": "FD", "H2": "FD to new images", "H3": "recall"}
    lines = []
    for each in r["tests"]:
        what = f"{names[each['key']]} {each['ratio']:.2f} × DDPM's, {each['seeds']} seeds"
        lines.append(f"- {each['claim']}: **{each['word']}** ({what})")
    return "\n".join(lines)


def block_host(up: str) -> str:
    """What a step costs the host, by our kernels and by torch's."""
    r = results("host")
    rows = []
    for op in ("group_norm_silu", "attention"):
        for way in ("forward", "backward"):
            cells = [r["ops"][f"{op} {path}"][way] for path in ("triton", "torch")]
            rows.append([f"{op}, {way}, units", *(f"{cell:.1f}" for cell in cells)])
    units = f"{r['optimizer']['units']:,.0f}"
    rows.append(["AdamW8bit with clip and two EMAs, units", units, "–"])
    for what, table_ in (("launches of a step", "launches"), ("units of a step", HOST_STEP)):
        cells = [r[table_][path]["step"] for path in ("triton", "torch")]
        rows.append([what, *(f"{cell:,.0f}" for cell in cells)])
    return paragraphs(
        table([f"host, {r['model']}", "with Triton", "with torch"], rows),
        origin(r, "a count, and medians"),
    )


HOST_STEP = "step of a miniature"


def block_boost(up: str) -> str:
    """Does the coupling of boosting help?"""
    return hypotheses(up, "boost")


def block_boost_twice(up: str) -> str:
    """The same for 32 px to 64 px."""
    return hypotheses(up, "boost-twice")


def block_boost_robohash(up: str) -> str:
    """The same for robohash, 64 px to 128 px."""
    return hypotheses(up, "boost-robohash")


def block_end_to_end(up: str) -> str:
    """Is boosting worth it from end to end?"""
    return hypotheses(up, "end-to-end")


def block_boosting(up: str) -> str:
    """What boosting costs."""
    if not is_measured("boosting"):
        return "The benchmark has not been run yet."
    r = results("boosting")
    times, robots = r["times"], r["robohash"]
    calls, seconds = times["evaluations"], times["seconds"]
    over, ratio = times["overhead"], times["images/s over full size's"]
    trained = sum(robots["training seconds"].values())
    rows = [[name, f"{value:.0f}"] for name, value in r["TFLOP of pipelines"].items()]
    return paragraphs(
        f"{calls['boosting']} evaluations from 64 px to 128 px take {over[1]:+.1%} beside the bare "
        f"calls of their network (quartiles {over[0]:+.1%} and {over[2]:+.1%}), and draw "
        f"{ratio[1]:.1f} times as many images a second ({ratio[0]:.1f} to {ratio[2]:.1f}) as "
        f"{calls['at full size']} evaluations of a network of the same size at 128 px: "
        f"{seconds['boosting'][1]:.2f} s and {seconds['at full size'][1]:.2f} s for "
        f"{times['batch']} images.",
        f"Robohash of 64 px, made 128 and then {robots['sides'][-1]} px by one command: "
        f"{robots['seconds of the one command']:.0f} s for {robots['drawn']} images, start of the "
        f"program included. Training the three networks took {trained:.0f} s, on "
        f"{robots['images each was trained on']} images each: it shows that this runs.",
        table(["from Stable Diffusion's size to 1024 px", "TFLOP an image"], rows),
        origin(r, f"seed 0; medians of {r['rounds']} rounds; untrained networks for times"),
    )


def hypotheses(up: str, name: str) -> str:
    """What became of each hypothesis of an experiment."""
    if not is_measured(f"{name}/verdict"):
        return "The experiment has not been run yet."
    r = results(f"{name}/verdict")
    rows = [[each["name"], each["word"], each["why"]] for each in r["verdicts"]]
    folder = f"{up}benchmarks/results/{name}"
    seeds = ", ".join(map(str, r["config"]["seeds"]))
    return paragraphs(
        table(["hypothesis", "verdict", "measured"], rows, left=3),
        f"[Report]({folder}/report.md); [as one file]({folder}/report.html).",
        origin(r, f"seeds {seeds}"),
    )


def block_finetune(up: str) -> str:
    """Native, aligned or as it was: how to go on from an eps network."""
    if not is_measured("finetune/verdict"):
        return "The experiment has not been run yet."
    r = results("finetune/verdict")
    rows = [[each["name"], each["word"], each["why"]] for each in r["verdicts"]]
    folder = f"{up}benchmarks/results/finetune"
    seeds = ", ".join(map(str, r["config"]["seeds"]))
    by_t = []
    for arm, rate in r["rates"].items():
        cards = [results(f"finetune/cards/{arm}-{k}-{rate:g}") for k in r["config"]["seeds"]]
        ends = [card["curve"][-1]["loss_by_t"] for card in cards]
        by_t.append([arm, *(f"{statistics.mean(column):.2f}" for column in zip(*ends))])
    n = len(by_t[0]) - 1
    times = [f"{(k + 0.5) / n:.2f}" for k in range(n)]
    images = cards[0]["curve"][-1]["images"]
    return paragraphs(
        table(["question", "verdict", "measured: ratio, 90% interval"], rows, left=3),
        f"L_u, the squared error of the velocity on held-out faces, after {images:,} images, by "
        "time (0 is data); means over seeds:",
        table(["t", *times], by_t),
        f"[Report]({folder}/report.md); [as one file]({folder}/report.html).",
        origin(r, f"seeds {seeds}"),
    )


def block_one_network(up: str) -> str:
    """How an error of weights adds up over steps, and how it does not."""
    r = results("one_network")
    ways = list(next(iter(r["results"].values())))
    rows = [
        [steps, *(f"{found[way]:.4f}" for way in ways)] for steps, found in r["results"].items()
    ]
    return paragraphs(
        table(["Euler steps", *ways], rows, left=0),
        origin(r, f"seed 0; {r['draws']:,} draws: standard errors are 0.5%"),
    )


def block_peer(up: str) -> str:
    """What diffusers' schedulers draw with the comparison's DDPM network, and what ours do."""
    if not is_measured("compare/peer-schedulers"):
        return ""
    r = results("compare/peer-schedulers")
    rows = []
    for row in r["rows"]:
        apart = row.get("largest difference")
        rows.append([row["way"], f"{row['std']:.2f}", number(apart, ".0e")])
    return paragraphs(
        table(["latents of", "deviation", "largest difference to the row above"], rows),
        origin(r, f"{r['n']} images, seeds from 0"),
    )


def block_convert(up: str) -> str:
    r = results("convert")
    c = r["convert"]
    return paragraphs(
        f"Files are converted tensor by tensor: {r['preset']} in fp16 ({r['bytes'] / 1e9:.1f} GB) "
        f"to diffusers' layout takes {c['seconds']:.0f} s, reading back included, and "
        f"{c['extra / largest tensor']:.2f} times the memory of its largest tensor.",
        origin(r, "random weights; measured once"),
    )


def block_latents(up: str) -> str:
    r, v, k = results("latents"), results("vae"), results("robohash")
    peers = ("diffusers", "diffusers channels_last")
    rows = [
        [
            name,
            *(
                f"{row[f'{way}, ratio to {peer}']:.2f}×"
                for way in ("encode", "decode")
                for peer in peers
            ),
        ]
        for name, row in v["results"].items()
    ]
    head = [
        "autoencoder on a CPU, random weights",
        "encode, against diffusers",
        "… in channels_last",
        "decode",
        "… in channels_last",
    ]
    kitten = k["results"]["compositor"]["64 px"]
    return paragraphs(
        table(head, rows),
        f"A latent cache is read at {r['ratio']:.2f} times the speed of a numpy memmap. A kitten "
        f"of 64 px takes {kitten['ms/image']:.2f} ms, with robohash's own code "
        f"{kitten['assemble() ms/image']:.0f}.",
        origin(v, f"seed 0; medians of {v['rounds']} rounds, spread not recorded"),
        origin(r, f"seed 0; medians of {r.get('rounds', 'several')} rounds, spread not recorded"),
        origin(k, f"kittens from 0 on; medians of {k['rounds']} rounds, spread not recorded"),
    )


def block_solvers(up: str) -> str:
    r, s, calls = results("solvers"), results("samplers"), 24
    rows = []
    for name, counts in r["results"].items():
        row = next(row for row in counts if row["calls"] == calls)
        distance = f"{row['distance']:.4f}" if "distance" in row else "(stochastic)"
        rows.append([name, f"{row['FD-pca']:.0f}", distance])
    head = [
        f"{calls} network calls on the network of the first picture",
        f"FD-pca of {r['n']} samples",
        "distance to 1,000 Heun steps",
    ]
    saved = [f"{row['calls saved']:.0%} at rtol {row['rtol']:g}" for row in r["dopri5"]]
    cost = [f"{name} {loop_cost(row)}" for name, row in s["results"].items()]
    peers = [
        f"{name.removeprefix('25 ').removesuffix(' steps')} {row['ratio to diffusers']:.2f}×"
        for name, row in s["results"].items()
        if "ratio to diffusers" in row
    ]
    spread = max(
        row["times"]["ours"]["interquartile range"] / row["times"]["ours"]["seconds"]
        for row in s["results"].values()
    )
    return paragraphs(
        table(head, rows),
        f"[More numbers of calls, and dopri5]({up}benchmarks/results/solvers.md). A step size for "
        "every sample makes a sample independent of its batch. It saves few calls here "
        f"({', '.join(saved)}): in latents of 2,048 numbers all samples are about equally hard. "
        "In few dimensions it saves about a quarter (tests/diffusion/test_solvers.py).",
        f"The loop's own cost beside its network calls: {', '.join(cost)}. Against diffusers' "
        f"scheduler loops with the same network: {', '.join(peers)}.",
        origin(r, f"seeds 0 to {r['n'] - 1}, one set of samples, so no spread"),
        origin(
            s,
            f"inputs of seed 0; medians of {s['repeats']} rounds, interquartile range up to "
            f"{spread:.1%}",
        ),
    )


def loop_cost(row: dict[str, Any]) -> str:
    return f"{1 / row['ratio to bare'] - 1:+.1%}"


def block_protocol(up: str) -> str:
    """The runs on kittens against parts of their data."""
    r, columns = results("protocol-robohash-pca"), ("all", "excluded tags", "rest")
    name = f"FD-pca{r['n']}"
    runs = {run: row for run, row in r["results"].items() if name in row["metrics"]["all"]}

    def cell(row: dict[str, Any], part: str) -> str:
        metric = row["metrics"].get(part, {}).get(name)
        if metric is None:
            return ""
        text = f"{metric['value']:.0f} ± {metric['error']:.0f}"
        return f"**{text}**" if part == row["trained on"] else text

    def memory(row: dict[str, Any]) -> str:
        found = row["metrics"].get(row["trained on"], {}).get("memorisation")
        if found is None:
            return "too few held out"
        return "FLAGGED" if found["flagged"] else "no"

    rows = [[run, *(cell(row, c) for c in columns), memory(row)] for run, row in runs.items()]
    any_run = next(iter(r["results"].values()))
    floors = [f"{any_run['metrics'][part][name]['floor']:.0f}" for part in columns]
    rows.append(["floor: real against real", *floors, ""])
    head = [
        f"{name} of the kittens above (bold: what a run was trained on)",
        *columns,
        "nearer to training than held-out images lie",
    ]
    rule = "|---|---:|---:|---:|---|"
    return paragraphs(
        "\n".join([row_of(head), rule, *map(row_of, rows)]),
        origin(r, f"one seed a run; {r['n']} samples, ± standard errors"),
    )


def block_fid(up: str) -> str:
    parity, speed = results("fid-parity"), results("fid-speed")["speed"]
    n = parity["n"]
    modes = [f"{row['difference']:.0e} ({mode})" for mode, row in parity["parity"].items()]
    apart = max(row["largest difference of features"] for row in parity["parity"].values())
    features = [f"{value:.2f}× {peer}" for peer, value in speed["times faster"].items()]
    frechet = [
        f"{row['times faster']:.0f}× scipy's sqrtm at {case.split(', ')[-1]}"
        for case, row in speed.items()
        if case.startswith("Fr")
    ]
    return paragraphs(
        f"On {n} kittens, features differ from the peers' (pytorch-fid, clean-fid, "
        f"torch-fidelity) by at most {apart:g}, and FIDs by {', '.join(modes)}. Speed on a CPU, as "
        f"a multiple of the peer's: features {' and '.join(features)}; the Fréchet distance "
        f"{' and '.join(frechet)}.",
        origin(parity, f"kittens 0 to {n - 1}; a comparison without randomness"),
        origin(results("fid-speed"), "seed 0; medians of a few rounds, spread not recorded"),
    )


def block_adamw8bit(up: str) -> str:
    r = results("adamw8bit")
    sides = {"fp32 moments": "adamw", "8-bit moments": "adamw8bit"}
    rows = []
    for label, optim in sides.items():
        runs = [run for name, run in r["runs"].items() if name.split()[0] == optim]
        losses = [f"{run['held-out loss']:.4f}" for run in runs]
        rows.append([label, *losses, f"{runs[0]['state bytes a parameter']:.2f}"])
    seeds = seeds_of(r)
    head = [
        f"held-out loss after {r['steps']} steps",
        *(f"seed {s}" for s in seeds),
        "bytes of state a parameter",
    ]
    return paragraphs(
        table(head, rows),
        f"The loss with 8-bit moments is {mean(r['ratios'], '.4f')} times that with fp32 moments.",
        origin(r, f"seeds {', '.join(seeds)}; ± standard error over seeds"),
        other_formats(),
    )


def block_rounding(up: str) -> str:
    r = results("rounding")
    labels = {
        "fp32": "fp32",
        "stochastic": "bf16, rounded stochastically",
        "nearest": "bf16, rounded to nearest",
    }
    rows = []
    for arm, label in labels.items():
        ratio = mean(r["ratios"][arm], ".4f") if arm in r["ratios"] else "1"
        rows.append([label, *(f"{loss:.4f}" for loss in r["held-out losses"][arm]), ratio])
    holds = "is" if r["stochastic holds"] else "is not"
    fails = "is" if r["nearest fails"] else "is not"
    seeds = [str(seed) for seed in r["seeds"]]
    return paragraphs(
        table(["weights", *(f"seed {s}" for s in seeds), "times fp32's"], rows),
        f"Held-out losses of `tiny` after {r['images']:,} toy faces at --lr {r['lr']:g}. By the "
        f"rule that was fixed before, rounding stochastically {holds} within 1% of fp32's loss, "
        f"and rounding to nearest {fails} more than 1% above it.",
        origin(r, f"seeds {', '.join(seeds)}; ± standard error over seeds"),
    )


def other_formats() -> str:
    """Whether another 8-bit format trains better: what was asked first, and of it what was asked
    once more."""
    first, again = results("formats8bit"), results("formats8bit_again")
    lines = []
    for r in (first, again):
        found = [
            f"{name} {v['ratio']:.4f} ± {v['error']:.4f} ({'' if v['better'] else 'not '}better)"
            for name, v in r["verdict"].items()
        ]
        seeds = ", ".join(map(str, r["seeds"]))
        lines.append(f"seeds {seeds}: {'; '.join(found)}")
    taken = [name for name, v in again["verdict"].items() if v["better"]]
    return paragraphs(
        f"Other 8-bit formats of the moments, their loss over today's: {'. Again, '.join(lines)}. "
        f"By the rule in the script, {', '.join(taken) or 'none'} is taken.",
        origin(again, "± standard error over seeds"),
    )


def seeds_of(r: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.split()[-1] for name in r["runs"]))


# ---- distillation --------------------------------------------------------------------------------


def block_distill(up: str) -> str:
    """The ablation's two tables, what an assessor costs, and progressive halving."""
    ablation, cost = results("distill/cpu/ablation"), results("distill/cpu/cost")
    scratch = results("distill/cpu/scratch")
    shares, named = cost["shares"], scratch["assessor"]
    return paragraphs(
        arms(ablation, "start as the teacher"),
        verdict(ablation, "ablation", up),
        arms(scratch, "start from nothing"),
        verdict(scratch, "scratch", up),
        "± are standard errors over seeds; FD is of "
        f"{scratch['references']['fd_images']:,} samples (10 Heun steps) in latents averaged to "
        f"4×4. The assessor named the timestep of held-out images with accuracy "
        f"{named['mean']:.2f}, chance {named['chance']:.2f}. Assessing takes "
        f"{shares['assessing, of D']:.1%} of a step of {cost['model']}, batch {cost['batch']}; a "
        f"step of D takes {1 + shares['D over B']:.3f} times one of B, one of B "
        f"{1 + shares['B over A']:.3f} times one of A.",
        halving(),
        # The two may have been measured by one command.
        *dict.fromkeys(origin(r, seeds_of_cards(r)) for r in (ablation, scratch)),
        origin(cost, f"seed 0; medians of {cost['rounds']} rounds, spread not recorded"),
        origin(results("distill/cpu/progressive"), "one run; three sets of seeds for its samples"),
    )


def seeds_of_cards(r: dict[str, Any]) -> str:
    seeds = dict.fromkeys(str(card["seed"]) for card in r["cards"])
    return f"seeds {', '.join(seeds)}; ± standard errors over seeds"


def arms(r: dict[str, Any], start: str) -> str:
    """A row an arm: its loss, its FD, what lies between that and B's."""
    cards = {(card["arm"], card["seed"]): card for card in r["cards"]}
    seeds = list(dict.fromkeys(card["seed"] for card in r["cards"]))
    rows = []
    for arm in sorted(dict.fromkeys(card["arm"] for card in r["cards"])):
        own = [cards[arm, seed] for seed in seeds]
        apart = [card["fd"] - cards["B", card["seed"]]["fd"] for card in own]
        clipped = [v for card in own for block in card["blocks"].values() for v in block["clipped"]]
        rows.append(
            [
                f"{arm}: {ARMS[arm]}",
                mean([card["held_out"][-1]["loss"] for card in own], ".4f"),
                mean([card["fd"] for card in own], ".2f"),
                "" if arm == "B" else mean(apart, "+.2f"),
                f"{statistics.mean(clipped):.0%}" if clipped and arm in "DES" else "",
            ]
        )
    known = r["references"]
    rows.append(
        [
            "the teacher; training images against others",
            "",
            f"{known['teacher']:.2f}; {known['floor']:.2f}",
            "",
            "",
        ]
    )
    images = f"{r['cards'][0]['images']:,} images, {len(seeds)} seeds"
    head = [
        f"students that {start}, {images}",
        "held-out loss",
        "FD",
        "FD - B's, paired",
        "λ clipped",
    ]
    return table(head, rows)


def verdict(r: dict[str, Any], part: str, up: str) -> str:
    shown = ("FD of D - B", "FD of D - C", "the tr")
    reasons = [why[0].upper() + why[1:] for why in r["reasons"] if why.startswith(shown)]
    folder = f"{up}benchmarks/results/distill/cpu/{part}"
    return (
        f"**The hypothesis is {r['verdict']}.** {' '.join(reasons)} "
        f"[Report]({folder}.txt), [curves]({folder}.png)."
    )


def halving() -> str:
    r = results("distill/cpu/progressive")
    rows = []
    for who in ("teacher", "student"):
        cells = [row.get(who) for row in r["results"].values()]
        rows.append(
            [who, *("" if c is None else f"{c['FD']:.2f} ± {c['error']:.2g}" for c in cells)]
        )
    return paragraphs(
        table(["progressive halving: FD by Euler steps", *r["results"]], rows),
        f"± here over three sets of {r['size']['fd']:,} samples of one run; "
        f"{r['size']['halved']:,} images a halving.",
    )


# ---- kernels -------------------------------------------------------------------------------------


CUT_SHORT = "Some parts were stopped before their last shape."


def block_kernels(up: str) -> str:
    """Kernels against their peers and whole steps, as far as a GPU has measured them."""
    name = "kernels-cuda" if is_measured("kernels-cuda") else "h100/kernels"
    parts = results(name)
    shown = [
        kernel_table(name, parts[name])
        for name in ("groupnorm", "attention", "optimizer")
        if name in parts
    ]
    if "step" in parts:
        shown.append(step_table(parts["step"]))
    return paragraphs(
        *shown,
        "Floors are a copy and a matmul measured in the same run; times are the GPU's, with cold "
        "caches; errors are relative, to fp64; MFU is the share of that matmul's rate. "
        + ("" if all(part["complete"] for part in parts.values()) else CUT_SHORT),
    )


def kernel_table(name: str, part: dict[str, Any]) -> str:
    rows = []
    for row in part["rows"]:
        for way in ("forward", "backward", "step"):
            if way in row:
                rows.append([row["shape"], way, *kernel_cells(row, way)])
    if not rows:
        return ""
    head = [name, "", "ours, µs", "of the floor", "against the best peer", "error, ours / peer"]
    how = "seed 0; medians, their interquartile ranges are in the file"
    return paragraphs(table(head, rows, left=2), origin(part, how))


def kernel_cells(row: dict[str, Any], way: str) -> list[str]:
    r, peer = row[way], row[way]["best peer"]
    seconds = r["times"]["ours"].get("seconds")
    of = "gradients" if way == "backward" else "output"
    errors = [
        number(row.get("errors", {}).get(side, {}).get(of, {}).get("frobenius"), ".1e")
        for side in ("ours", peer)
    ]
    return [
        number(seconds and seconds * 1e6, ".1f"),
        number(r["share of floor"], ".0%"),
        f"{number(r['times faster'], '.2f')}× {peer or ''}",
        " / ".join(errors),
    ]


def step_table(part: dict[str, Any]) -> str:
    rows = [
        [
            r["shape"].removeprefix("step "),
            r["side"],
            f"{r['images/s']:.0f}",
            f"{r['MFU']:.0%}",
            f"{r['peak bytes'] / 1e9:.1f}",
            r["optimizer"],
        ]
        for r in part["rows"]
        if "seconds" in r
    ]
    if not rows:
        return ""
    head = ["training step, bf16", "", "images/s", "MFU", "peak GB", "optimizer"]
    how = "seed 0; medians, their interquartile ranges are in the file"
    return paragraphs(table(head, rows, left=2), origin(part, how))


def block_isa(up: str) -> str:
    """What is in each kernel's machine code, before and now."""
    r = results("isa")
    rows = []
    for row in r["rows"]:
        now, before = row["now"], row.get("before", {})
        others = [share_of_warps(now[gpu]) for gpu in ISA if gpu in now]
        cells = [then_and_now(before.get("sm_90"), now["sm_90"], name) for name in COUNTED]
        rows.append([row["kernel"], f"{row['bytes'] / 1e6:,.1f}", *cells, ", ".join(others)])
    head = [
        "kernel, on sm_90",
        "MB at least",
        "instructions",
        "in loops",
        "registers",
        "shared memory, B",
        "warps at once",
        "on other GPUs",
    ]
    spilled = {
        side: sum(n["spilled"] > 0 for row in r["rows"] for n in row.get(side, {}).values())
        for side in ("before", "now")
    }
    return paragraphs(
        table(head, rows),
        f"One call in a training step of {r['model']} at batch {r['batch']}. MB are what it has to "
        "read and write once; warps, the share of a multiprocessor's that registers and shared "
        f"memory let run at once (other GPUs: {', '.join(ISA)}, without those where the kernel "
        "does not run). A loop may have been unrolled. What stands before an arrow is commit "
        f"{r['before'][:9]}. Over all five GPUs, {spilled['before']} of these spilled registers "
        f"then, {spilled['now']} now.",
        origin(r, "a count without randomness"),
    )


def share_of_warps(n: dict[str, Any]) -> str:
    return f"{n['occupancy']:.0%}"


def then_and_now(before: dict[str, Any] | None, now: dict[str, Any], name: str) -> str:
    """ "841 → 575", or one number where nothing changed or nothing was before."""
    form = share_of_warps if name == "occupancy" else lambda n: f"{n[name]:,}"
    texts = [form(n) for n in (before, now) if n]
    return " → ".join(dict.fromkeys(texts))


# ---- README's short table ------------------------------------------------------------------------


def excluded_distance(result: dict[str, Any], stage: str, name: str) -> str:
    """A stage's distance to the images with excluded tags, with its error."""
    metric = result["results"][stage]["metrics"]["excluded tags"][name]
    return f"{metric['value']:.0f} ± {metric['error']:.0f}"


def assessed_minus_fixed(result: dict[str, Any]) -> list[float]:
    """By seed, the FD of arm D less that of arm B."""
    fd = {(card["arm"], card["seed"]): card["fd"] for card in result["cards"]}
    return [fd["D", seed] - fd["B", seed] for arm, seed in fd if arm == "D"]


def said(used: tuple[dict[str, Any], ...]) -> str:
    """What stands below the short table."""
    machines = "; ".join(dict.fromkeys(machine(result) for result in used))
    return (
        "± are standard errors. Nothing here was measured on a GPU.\n"
        f"Machines: {machines}."
    )


def cpu_rows(train: dict[str, Any], default: dict[str, Any]) -> list[list[str]]:
    """Training on a CPU, in README's short table."""

    def span(name: str) -> str:
        ratios = [row[name] for key, row in train["results"].items() if key != "loading"]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    what = f"`python train.py` in {default['dtype']} on {machine(default)}"
    return [
        [what, f"{default['seconds'] / 60:.1f} minutes", "one run", commit(default)],
        [
            "CPU training, times diffusers' (fp32; bf16)",
            f"{span('ratio to diffusers channels_last')}; {span(BEST)}",
            f"{train['rounds']} rounds",
            commit(train),
        ],
    ]


def block_begin(up: str) -> str:
    """How long README's first command takes."""
    default = results("default_run")
    return paragraphs(
        f"**See it work.** {default['seconds'] / 60:.1f} minutes of training in {default['dtype']} "
        f"on {default['machine']['threads']} cores of an {default['machine']['cpu']} draw faces "
        "like the upper ones (Python 3.11 or 3.12; on a bare Debian or Ubuntu first `apt install "
        "git python3-venv`):"
    )


def block_results(up: str) -> str:
    """Some numbers, each with its seeds or rounds and its commit."""
    train, loops = results("train_cpu"), results("samplers")
    parity, speed = results("fid-parity"), results("fid-speed")
    adam, kittens = results("adamw8bit"), results("protocol-robohash-pca")
    arms_of = results("distill/cpu/ablation")
    gap = max(row["difference"] for row in parity["parity"].values())
    frechet = speed["speed"]["Fréchet, d = 2048, N = 5000"]["times faster"]
    name = f"FD-pca{kittens['n']}"
    fine, stage2 = (excluded_distance(kittens, stage, name) for stage in ("fine", "stage2"))
    apart = assessed_minus_fixed(arms_of)
    rows = cpu_rows(train, results("default_run")) + [
        [
            "25 Heun steps, cost beside the network's calls",
            loop_cost(loops["results"]["25 Heun steps"]),
            f"{loops['repeats']} rounds",
            commit(loops),
        ],
        [
            "FID: difference to pytorch-fid; speed of the Fréchet distance",
            f"{gap:.0e}; {frechet:.0f}×",
            f"n = {parity['n']}",
            commit(parity),
        ],
        [
            "loss with 8-bit AdamW over that with fp32",
            mean(adam["ratios"], ".4f"),
            f"{len(adam['ratios'])} seeds",
            commit(adam),
        ],
        [
            f"{name} to excluded tags, after `fine` and `stage2`",
            f"{fine}, {stage2}",
            f"n = {kittens['n']}",
            commit(kittens),
        ],
        [
            f"distillation: FD, assessed minus fixed λ: {arms_of['verdict']}",
            mean(apart, "+.2f"),
            f"{len(apart)} seeds",
            commit(arms_of),
        ],
    ]
    used = (train, loops, parity, adam, kittens, arms_of)
    return paragraphs(table(["what", "result", "seeds or rounds", "commit"], rows), said(used))


def block_sharding(up: str) -> str:
    """What each GPU holds of SDXL, in GiB."""
    r = results("sharding")
    rows = []
    for row in r["rows"]:
        sizes = [*row["bytes"].values(), sum(row["bytes"].values())]
        place = f"{row['gpus']}, on {row['hosts']}"
        rows.append([place, row["optim"], *(f"{size / 2**30:.2f}" for size in sizes)])
    head = ["GPUs, on hosts", "optimizer", *r["rows"][0]["bytes"], "in all"]
    small = (
        f"<sub>SDXL's U-Net, {r['parameters']:,} parameters; GiB of the GPU that holds most, "
        "counted from shapes, not measured.</sub>"
    )
    return paragraphs(table(head, rows, left=2), small)


def block_uncertainty_cost(up: str) -> str:
    """What --uncertainty costs."""
    r, rows = results("uncertainty_cost"), []
    for name, row in r["results"].items():
        if name != "plain":
            low, high = row["quartiles"]
            rows.append([name, f"{row['ratio']:.2f}×", f"{low:.2f} to {high:.2f}"])
    head = ["16 images", "CPU time of plain sampling", "quartiles"]
    return paragraphs(table(head, rows), origin(r, f"medians of {r['rounds']} rounds"))


def block_loading(up: str) -> str:
    """The most memory of a rank, in copies of its network."""
    r = results("loading")
    rows = [
        [f"begun {how}" if how.startswith("from") else how, *(f"{n:.2f}" for n in part.values())]
        for how, part in r["copies"].items()
    ]
    head = ["a run that is", *next(iter(r["copies"].values()))]
    words = f"{r['parameters']:,} fp32 weights are one copy; the most of {r['ranks']} ranks"
    return paragraphs(table(head, rows), origin(r, f"{words}, {r['optim']}; one run"))


def block_budget(up: str) -> str:
    """What a fine-tuning of SDXL comes to, beside what nyaflow-xl's authors say of theirs."""
    r = results("budget")
    source, sizes = r["source"], r["bytes"]
    rows = [
        [
            f"{row['gpus']}",
            f"{row['images/s']:.0f}",
            f"{row['hours a pass']:.1f}",
            f"{row['GPU-hours a pass']:.0f}",
        ]
        for row in r["speeds"]
    ]
    shown = source["shown"]
    checkpoints = "; ".join(
        f"{row['optim']} with {row['emas']} average{'s' if row['emas'] > 1 else ''} "
        f"{row['bytes'] / 1e9:.0f} GB"
        for row in r["checkpoints"]
    )
    text = r["speeds"][0]["text FLOP/s a GPU"]
    return paragraphs(
        table(["H100s", "images/s", "hours a pass", "GPU-hours a pass"], rows),
        f"A pass is over the source's {source['images'] / 1e6:.1f} million pictures. A step takes "
        f"{r['flops of a step, an image'] / 1e12:.1f} TFLOP an image of 1024 px, counted from "
        f"shapes. That a step uses {r['utilisation']:.0%} of the GPU's {r['peak'] / 1e12:.0f} "
        f"TFLOP/s is an assumption, and so is that {max(row['gpus'] for row in r['speeds'])} GPUs "
        "lose nothing to each other. The source's "
        f"{source['gpus']} H100s × {source['hours']} h are {source['GPU-hours']:,} GPU-hours: at "
        f"most {shown / 1e6:.0f} million images so, {shown / source['images']:.0f} passes.",
        f"Disk: {sizes['latents of an image'] / 1e3:.0f} kB of latents an image, "
        f"{sizes['latents'] / 1e9:,.0f} GB in all. A checkpoint: {checkpoints}; there are up to "
        f"{r['kept']} of them while one is written. Encoded texts would be "
        f"{sizes['encoded text of an image'] / 1e3:.0f} kB an image, "
        f"{sizes['encoded texts'] / 1e12:.1f} TB in all, so they are encoded as they come: "
        f"{r['flops of a text'] / 1e12:.2f} TFLOP a text, {text / 1e12:.1f} TFLOP/s of each "
        "GPU at the speed above.",
        f"<sub>`python benchmarks/budget.py`; commit {commit(r)}; counted from shapes, not "
        "measured.</sub>",
    )


# ---- all of it -----------------------------------------------------------------------------------

BLOCKS = {
    "map": block_map,
    "begin": block_begin,
    "results": block_results,
    "speed": block_speed,
    "transformer": block_transformer,
    "text": block_text,
    "prompts": block_prompts,
    "stages": block_stages,
    "compare": block_compare,
    "kittens": block_kittens,
    "architecture": block_architecture,
    "finetune": block_finetune,
    "peer": block_peer,
    "answer": block_answer,
    "protocol": block_protocol,
    "latents": block_latents,
    "solvers": block_solvers,
    "convert": block_convert,
    "fid": block_fid,
    "adamw8bit": block_adamw8bit,
    "rounding": block_rounding,
    "distill": block_distill,
    "kernels": block_kernels,
    "isa": block_isa,
    "host": block_host,
    "boost": block_boost,
    "boost_twice": block_boost_twice,
    "boost_robohash": block_boost_robohash,
    "boosting": block_boosting,
    "end_to_end": block_end_to_end,
    "sharding": block_sharding,
    "loading": block_loading,
    "uncertainty_cost": block_uncertainty_cost,
    "budget": block_budget,
    "one_network": block_one_network,
}


# Blocks that do not stand in docs/results.md.
ELSEWHERE = (
    "map",
    "begin",
    "answer",
    "results",
    "isa",
    "host",
    "boost",
    "boost_twice",
    "boost_robohash",
    "boosting",
    "end_to_end",
    "rounding",
    "sharding",
    "loading",
    "uncertainty_cost",
    "budget",
    "one_network",
)


def written(page: Path) -> str:
    """The page with its blocks made again."""
    in_readme = page.name == "README.md"
    up = "" if in_readme else "../"
    text = page.read_text()
    for name in ("begin", "answer", "results") if in_readme else BLOCKS:
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        if start in text:
            before, _, rest = text.partition(start)
            _, _, after = rest.partition(end)
            text = before + start + BLOCKS[name](up) + "\n" + end + after
    return text


def main() -> None:
    tables = (ROOT / "docs" / "results.md").read_text()
    for name in BLOCKS:
        if name not in ELSEWHERE and f"<!-- {name} -->" not in tables:
            sys.exit(f"docs/results.md has no block named {name}.")
    changed = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = written(page)
        if text != page.read_text():
            changed.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                page.write_text(text)
    if "--check" in sys.argv and changed:
        sys.exit(f"out of date: {', '.join(changed)}.  Run python benchmarks/readme.py")
    print(f"written: {', '.join(changed)}" if changed else "up to date")


if __name__ == "__main__":
    main()
