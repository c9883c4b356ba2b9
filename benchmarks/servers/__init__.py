"""The servers by themselves: their engine computes nothing, and clients cost little."""
