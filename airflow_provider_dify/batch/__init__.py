"""Many workflow runs in one task: rows in, runs, results out."""
