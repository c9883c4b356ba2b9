"""The API half of a replica: from calls to submissions, from outputs to answers."""
