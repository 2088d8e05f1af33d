"""What a distillation is made of, beside its loop (distill.py):

teacher     the frozen network, under its own noise schedule
assessor    small networks that read the timestep out of a U-Net's blocks, and the formulas
pretrain    how an assessor is made: python distill.py pretrain-assessor
timesteps   times drawn where an assessor finds the teacher hard to read

Read teacher first. The published system is AbstractPhil's sd15-flow-matching ("the source").
"""
