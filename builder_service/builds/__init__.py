"""The service of builds: who asks for one, what runs, what is written down of it, and what is told."""
