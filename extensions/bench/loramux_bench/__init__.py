"""Load on an inference service, and what became of it: `workload`, `drive`, `figures`, `plot`."""
