"""HTTP itself: connections, heads, bodies, answers, streams, and what a request that fails hears."""
