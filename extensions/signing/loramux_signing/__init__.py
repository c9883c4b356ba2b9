"""OpenSSF model signing: whose signatures are asked for, and what is signed."""
