"""What makes a script a good citizen.

cli: flags and errors.  ranks: processes and devices.  run: a run's folder, log and signals.
files: atomic writing, safetensors.  pictures, plot: what people look at.  ema: averaged weights.
interrupt: Ctrl-C during imports.  record: measurements.  Nothing here knows a network.
"""
