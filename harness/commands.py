"""The commands of this project, as words after python: for what is measured or tested of each."""

COMMANDS = (
    "train.py",
    "samplers.py",
    "distill.py",
    "distill.py pretrain-assessor",
    "eval_fid.py",
    "vae.py",
    "text.py encode",
    "experiments/ablate.py",
    "experiments/architecture.py",
    "experiments/compare.py",
    "experiments/protocol.py",
    "experiments/stages.py",
    "experiments/uncertainty.py",
    "-m ckpt",
    "-m data",
    "-m data.emoji",
    "-m data.encode",
    "-m metrics.inception",
    "-m metrics.clip_score",
    "-m harness.plot",
)
