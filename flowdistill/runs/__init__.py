"""Trained models, by the run directory that holds them: `flowdistill.runs.run.Run`."""
