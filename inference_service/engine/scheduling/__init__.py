"""The next step: whose tokens it computes, and which blocks and adapters are at hand."""
