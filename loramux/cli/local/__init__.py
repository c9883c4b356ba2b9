"""Services on this machine: `serve` and `builder` become one, `up` and `demo` run both as children."""
