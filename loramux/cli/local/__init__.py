"""Services on this machine: `serve` and `builder` become one, `up` runs both as children."""
