"""Write the numbers in README.md:  python benchmarks/readme.py [--check]

Every block between <!-- name --> and <!-- end --> that is named below is replaced by what the tree and
benchmarks/results/*.json say. --check only says whether it is up to date (exit code 1 if not).
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAP = {
    "model.py": "the U-Nets: config, presets, forward; the config that a file's names and shapes tell",
    "blocks.py": "what they are made of: ADM's blocks, Stable Diffusion's transformer, under their authors' names",
    "objectives.py": "one interpolant; DDPM, v, x0, flow matching; weights, losses, learned variance; conversion to one velocity",
    "schedules.py": "noise schedules as maps to one clock; how training times are drawn",
    "coupling.py": "which noise, or other start, belongs to which data: minibatch OT, low resolution",
    "solvers.py": "time grids and fourteen methods, a small function each: Runge–Kutta, multistep, stochastic, adaptive",
    "samplers.py": "sampling, guidance, image to image, inpainting, inversion",
    "pictures.py": "pictures in and out: PNG, grids, npz, masks",
    "drawing.py": "the sampling command: its flags, what they may be together, the pictures it makes",
    "train.py": "the training loop, and all of its settings on one screen",
    "settings.py": "its flags: what depends on others filled in, what cannot run refused",
    "start.py": "what a run starts from: another network's weights, an autoencoder",
    "ema.py": "power-function averages of the weights",
    "run.py": "a run: its ranks, its folder, its log, its signals",
    "watch.py": "held-out loss by t, sample previews",
    "data.py": "stages cut out by tag, and an order that is a function of (seed, images seen)",
    "sources.py": "where images come from: folders, parquet, the Hub, the embedded sets",
    "images.py": "one image file to pixels, whatever is in it",
    "tags.py": "tags, expressions over them, captions",
    "latents.py": "the latent cache: what is in it, reading and verifying it",
    "encode.py": "… and writing it: on any number of ranks, through any kill, the same bytes",
    "toyfaces.py": "the embedded data set: tagged faces, drawn",
    "robo.py": "real tagged art, put together from the pictures of robohash",
    "vae.py": "autoencoders of SD, SDXL, Flux 1 and Flux 2, in every layout",
    "distill.py": "a teacher's targets in train.py's loop, blocks weighed by an assessor, progressive halving",
    "distill_flags.py": "its flags: filled in from the teacher, refused where they cannot run or change nothing",
    "teacher.py": "a frozen network to ask, on its own schedule",
    "assessor.py": "what reads timesteps and patterns out of blocks, and its pretraining",
    "timesteps.py": "timesteps drawn by the assessor's profile",
    "ablate.py": "arms, seeds, a rule fixed beforehand, a report",
    "autoencoder.py": "their convolutional encoder and decoder",
    "linear.py": "the linear autoencoder that needs no download, and pixels",
    "ckpt.py": "U-Nets on disk, ours and others': load, save, convert; strict and self-describing",
    "examine.py": "what a file is and lacks; whether two hold the same network",
    "probe.py": "what a network computes, in eight numbers, kept with its weights",
    "files.py": "tensors on disk: any container by its content, streamed and atomic writing",
    "hub.py": "hf:org/name, fetched once, with its commit and sha256",
    "layouts.py": "what other code bases call our tensors and configs: exact maps in both directions",
    "eval_fid.py": "FID, KID, precision and recall, memorisation of a checkpoint or of folders; metric cards and their table",
    "metrics.py": "distances between sets of features, and the statistics they are made of",
    "features.py": "sets of images and their features, computed once, kept on disk",
    "inception.py": "the Inception network that FID means, its weights and its ways to resize",
    "config.py": "dataclass → command line; one-line errors; device and precision",
    "kernels/attention.py": "attention, forward and backward",
    "kernels/groupnorm.py": "GroupNorm + FiLM + SiLU, forward and backward, channels_last",
    "kernels/adamw8bit.py": "AdamW with 8-bit moments in bitsandbytes' format: one launch on a GPU, the same codes on a CPU",
    "kernels/dispatch.py": "which path an op takes, said once: KERNELS=auto, triton or torch",
    "kernels/bench.py": "kernels against their peers and against the floor, where you are",
}


ABLATION = {"A": "no block losses", "B": "λ = w", "C": "λ = D's mean", "D": "λ by the assessor", "E": "by an untrained one (placebo)", "S": "by other blocks' (placebo)"}


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def origin(r: dict) -> str:
    """Where a result comes from, as a line of small print."""
    commit = (r["commit"] or "no commit")[:9] + (" + uncommitted changes" if r["dirty"] else "")
    where = r["machine"]["gpu"] or f"{r['machine']['cpu']}, {r['machine']['threads']} threads"
    return f"<sub>`{r['command']}`; {where}; torch {r['versions']['torch']}; commit {commit}</sub>"


def block_map() -> str:
    lines = ["| file | lines | concept |", "|---|---:|---|"]
    for name, what in MAP.items():
        lines.append(f"| [{name}]({name}) | {len((ROOT / name).read_text().splitlines())} | {what} |")
    return "\n".join(lines)


def block_speed() -> str:
    r = results("train_cpu")
    lines = ["| one training step on a CPU | images/s | against diffusers `UNet2DModel` | … in channels_last |", "|---|---:|---:|---:|"]
    for name, row in r["results"].items():
        if name != "loading":
            lines.append(f"| {name} | {row['images/s']:.0f} | {row['ratio to diffusers']:.2f}× | {row['ratio to diffusers channels_last']:.2f}× |")
    lines += ["", f"Same weights, inputs and optimizer; medians of {r['rounds']} alternating rounds. A step with real data takes "
              f"{r['results']['loading']['ratio']:.3f}× the time of one with a constant batch.", "", origin(r)]
    return "\n".join(lines)


def block_stages() -> str:
    r = results("stages")
    lines = ["| samples that show | " + " | ".join(f"`{c}`" + (" (excluded)" if c in r["excluded"] else "")
                                                   for c in r["share of samples"]["fine"]) + " |", "|---|" + "---:|" * 4]
    for stage, shares in r["share of samples"].items():
        lines.append(f"| after `{stage}` | " + " | ".join(f"{v:.1%}" for v in shares.values()) + " |")
    lines += ["", f"{r['samples a run']} samples a run, one seed; attributes read back by search for the nearest drawing, which reads "
              f"{r['reader accuracy on real faces']:.1%} of real faces right.", "", origin(r)]
    return "\n".join(lines)


def block_convert() -> str:
    """Only once it has been measured."""
    if not (ROOT / "benchmarks" / "results" / "convert.json").exists():
        return ""
    r = results("convert")
    return (f"Files are converted tensor by tensor: {r['preset']} in fp16 ({r['bytes'] / 1e9:.1f} GB) to diffusers' layout takes {r['convert']['seconds']:.0f} s, "
            f"reading back included, and {r['convert']['extra / largest tensor']:.2f} times the memory of its largest tensor.\n\n" + origin(r))


def block_latents() -> str:
    r, v, k = results("latents"), results("vae"), results("robohash")
    ratios = [[f"{row[f'{part}, ratio to {peer}']:.2f}×" for part in ("encode", "decode") for peer in ("diffusers", "diffusers channels_last")]
              for row in v["results"].values()]
    rows = [f"| {name} | {' | '.join(row)} |" for name, row in zip(v["results"], ratios)]
    kitten = k["results"]["compositor"]["64 px"]
    return "\n".join(["| autoencoder on a CPU, random weights | encode, against diffusers | … in channels_last | decode | … in channels_last |",
                      "|---|---:|---:|---:|---:|", *rows, "",
                      f"A latent cache is read at {r['ratio']:.2f} times the speed of a numpy memmap. A kitten of 64 px takes {kitten['ms/image']:.2f} ms, with "
                      f"robohash's own code {kitten['assemble() ms/image']:.0f}.", "", origin(v), "", origin(r), "", origin(k)])


def block_solvers() -> str:
    r, s, calls = results("solvers"), results("samplers"), "24"
    rows = {name: next(row for row in rows if str(row["calls"]) == calls) for name, rows in r["results"].items()}
    lines = [f"| {calls} network calls on the network of the first picture | FD-pca of {r['n']} samples | distance to 1,000 Heun steps |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['FD-pca']:.0f} | {format(row['distance'], '.4f') if 'distance' in row else '(stochastic)'} |" for name, row in rows.items()]
    saved = ", ".join(f"{row['calls saved']:.0%} at rtol {row['rtol']:g}" for row in r["dopri5"])
    loops = {name: row for name, row in s["results"].items()}
    cost = ", ".join(f"{name} {1 / row['ratio to bare'] - 1:+.1%}" for name, row in loops.items())
    peers = ", ".join(f"{name.removeprefix('25 ').removesuffix(' steps')} {row['ratio to diffusers']:.2f}×" for name, row in loops.items() if "ratio to diffusers" in row)
    return "\n".join([*lines, "", "[More numbers of calls, and dopri5](benchmarks/results/solvers.md). A step size for every sample, which makes a sample independent of "
                      f"its batch, saves few calls here ({saved}): in latents of 2,048 numbers all samples are about equally hard. In few dimensions it saves "
                      f"about a quarter (tests/test_solvers.py).", "", f"The loop's own cost beside its network calls: {cost}. Against diffusers' scheduler loops "
                      f"with the same network: {peers}.", "", origin(r), "", origin(s)])


def block_protocol() -> str:
    """The runs on kittens against parts of their data."""
    r, columns = results("protocol-robohash-pca"), ("all", "excluded tags", "rest")
    name = f"FD-pca{r['n']}"

    def cell(run: dict, part: str) -> str:
        m = run["metrics"].get(part, {}).get(name)
        return "" if m is None else ("**" * (part == run["trained on"])).join(("", f"{m['value']:.0f} ± {m['error']:.0f}", ""))
    lines = [f"| {name} of the kittens above (bold: what a run was trained on) | {' | '.join(columns)} | nearer to training than held-out images lie |",
             "|---|---:|---:|---:|---|"]
    for run, row in r["results"].items():
        if name in row["metrics"]["all"]:
            memory = row["metrics"].get(row["trained on"], {}).get("memorisation")
            note = "too few held out" if memory is None else "FLAGGED" if memory["flagged"] else "no"
            lines.append(f"| {run} | {' | '.join(cell(row, part) for part in columns)} | {note} |")
    floors = [next(iter(r["results"].values()))["metrics"][part][name]["floor"] for part in columns]
    return "\n".join([*lines, f"| floor: real against real | {' | '.join(f'{v:.0f}' for v in floors)} | |", "", origin(r)])


def block_fid() -> str:
    parity, speed = results("fid-parity"), results("fid-speed")
    modes = ", ".join(f"{mode} {row['difference']:.0e}" for mode, row in parity["parity"].items())
    apart = max(row["largest difference of features"] for row in parity["parity"].values())
    s = speed["speed"]
    features = " and ".join(f"{v:.2f}× {peer}" for peer, v in s["times faster"].items())
    frechet = ", ".join(f"{s[key]['times faster']:.0f}× scipy's sqrtm at {key.split(', ')[-1]}" for key in s if key.startswith("Fr"))
    return (f"On {parity['n']} kittens, features differ from the peers' (pytorch-fid, clean-fid, torch-fidelity) by at most {apart:g}, FIDs by {modes}. Features "
            f"run at {features} on a CPU; the Fréchet distance is {frechet}.\n\n" + origin(parity) + "\n\n" + origin(speed))


def block_distill() -> str:
    """The ablation's two tables, what an assessor costs, and progressive halving."""
    mean = lambda values, form: f"{statistics.mean(values):{form}} ± {statistics.stdev(values) / len(values) ** 0.5:.2g}"
    lines, small = [], []
    for part, students in (("ablation", "start as the teacher"), ("scratch", "start from nothing")):
        r = results(f"distill/cpu/{part}")
        by = {(c["arm"], c["seed"]): c for c in r["cards"]}
        arms, seeds = dict.fromkeys(c["arm"] for c in r["cards"]), dict.fromkeys(c["seed"] for c in r["cards"])
        own, b = lambda arm: [by[arm, seed] for seed in seeds], [by["B", seed] for seed in seeds]
        lines += [f"| students that {students}, {r['cards'][0]['images']:,} images, {len(seeds)} seeds | held-out loss | FD | FD - B's, paired | λ clipped |", "|---|---:|---:|---:|---:|"]
        for arm in sorted(arms):
            apart = "" if arm == "B" else mean([c["fd"] - d["fd"] for c, d in zip(own(arm), b)], "+.2f")
            clipped = [v for c in own(arm) for block in c["blocks"].values() for v in block["clipped"]]
            lines.append(f"| {arm}: {ABLATION[arm]} | {mean([c['held_out'][-1]['loss'] for c in own(arm)], '.4f')} | {mean([c['fd'] for c in own(arm)], '.2f')} | "
                         f"{apart} | {f'{statistics.mean(clipped):.0%}' if clipped and arm in 'DES' else ''} |")
        hold = r["references"]
        lines += [f"| the teacher; training images against others | | {hold['teacher']:.2f}; {hold['floor']:.2f} | | |", "",
                  f"**The hypothesis is {r['verdict']}.** {' '.join(w[0].upper() + w[1:] for w in r['reasons'] if w.startswith(('FD of D - B', 'FD of D - C', 'the tr')))} "
                  f"[Report](benchmarks/results/distill/cpu/{part}.txt), [curves](benchmarks/results/distill/cpu/{part}.png).", ""]
        small += [origin(r), ""]
    cost, halved = results("distill/cpu/cost"), results("distill/cpu/progressive")
    lines += [f"± are standard errors over seeds; FD is of {r['references']['fd_images']:,} samples (10 Heun steps) in latents averaged to 4×4. The assessor named the timestep "
              f"of held-out images with accuracy {r['assessor']['mean']:.2f}, chance {r['assessor']['chance']:.2f}. Assessing takes {cost['shares']['assessing, of D']:.1%} of a "
              f"step of {cost['model']}, batch {cost['batch']}; a step of D takes {1 + cost['shares']['D over B']:.3f} times one of B, one of B "
              f"{1 + cost['shares']['B over A']:.3f} times one of A.", "",
              "| progressive halving: FD by Euler steps | " + " | ".join(halved["results"]) + " |", "|---|" + "---:|" * len(halved["results"])]
    for who in ("teacher", "student"):
        lines.append(f"| {who} | " + " | ".join(f"{row[who]['FD']:.2f} ± {row[who]['error']:.2g}" if who in row else "" for row in halved["results"].values()) + " |")
    lines += ["", f"± here over three sets of {halved['size']['fd']:,} samples of one run; {halved['size']['halved']:,} images a halving.", ""]
    return "\n".join([*lines, *small, origin(cost), "", origin(halved)])


def block_kernels() -> str:
    """Kernels against their peers and whole steps; nothing before a GPU has been measured."""
    if not (ROOT / "benchmarks" / "results" / "kernels-cuda.json").exists():
        return ""
    parts, lines, number = results("kernels-cuda"), [], lambda value, form: "–" if value is None else format(value, form)
    for part in ("groupnorm", "attention", "optimizer"):
        rows = [(row["shape"], way, row[way], row.get("errors", {})) for row in parts.get(part, {}).get("rows", []) if parts[part]["complete"]
                for way in ("forward", "backward", "step") if way in row]
        if not rows:
            continue
        lines += [f"| {part} | | ours, µs | of the floor | against the best peer | error, ours / peer |", "|---|---|---:|---:|---:|---:|"]
        for shape, way, r, errors in rows:
            of, seconds, faster = "gradients" if way == "backward" else "output", r["times"]["ours"].get("seconds"), r["times faster"]
            error = [errors.get(side, {}).get(of, {}).get("frobenius") for side in ("ours", r["best peer"])]
            lines.append(f"| {shape} | {way} | {number(seconds and seconds * 1e6, '.1f')} | {number(r['share of floor'], '.0%')} | "
                         f"{number(faster, '.2f')}× {r['best peer'] or ''} | {' / '.join(number(e, '.1e') for e in error)} |")
        lines += ["", origin(parts[part]), ""]
    steps = [row for row in parts.get("step", {}).get("rows", []) if "seconds" in row and parts["step"]["complete"]]
    if steps:
        lines += ["| training step, bf16 | | images/s | MFU | peak GB | optimizer |", "|---|---|---:|---:|---:|---|"]
        lines += [f"| {r['shape'].removeprefix('step ')} | {r['side']} | {r['images/s']:.0f} | {r['MFU']:.0%} | {r['peak bytes'] / 1e9:.1f} | "
                  f"{r['optimizer']} |" for r in steps]
        lines += ["", origin(parts["step"]), ""]
    return "\n".join(lines + ["Floors are a copy and a matmul measured in the same run; times are the GPU's, with cold caches; errors are relative, to fp64; MFU is the share of that matmul's rate."])


def main() -> None:
    path, blocks = ROOT / "README.md", {"map": block_map, "speed": block_speed, "stages": block_stages, "kernels": block_kernels, "convert": block_convert, "latents": block_latents, "solvers": block_solvers,
                                          "protocol": block_protocol, "fid": block_fid, "distill": block_distill}
    old = new = path.read_text()
    for name, make in blocks.items():
        new, n = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, make=make: m[1] + make() + "\n" + m[2], new, flags=re.S)
        assert n == 1, f"README.md has {n} blocks named {name}"
    if "--check" in sys.argv:
        print("README.md is up to date" if old == new else "README.md is out of date: python benchmarks/readme.py")
        sys.exit(old != new)
    path.write_text(new)


if __name__ == "__main__":
    main()
