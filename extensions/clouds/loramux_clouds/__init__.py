"""Sources of adapters and bases in Google Cloud Storage and Azure Blob Storage."""
