"""The doctor: `installed` packages, the `machine` and the places around it, and the `sizes` of a base."""
