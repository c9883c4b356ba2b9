"""An adapter's life on a replica: names, generations, bundles, residency, and what operators do with them."""
