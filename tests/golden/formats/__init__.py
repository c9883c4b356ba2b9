"""A linear in each format of low bits, as the format's own library wrote it, and as that library widens it."""
