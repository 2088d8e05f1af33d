"""What makes a script a good citizen: flags and errors (cli), processes (ranks), a run's folder (run), files and pictures."""
