"""The service of builds: callers, running builds, the journal, and the views for clients."""
