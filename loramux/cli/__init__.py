"""The ``loramux`` command line."""

import os

# A failure is one line of ours; below ERROR, gRPC's core would log its handshakes and connections.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
