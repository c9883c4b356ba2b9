"""The doors by themselves: a server whose engine computes nothing, and clients that cost little."""
