"""Load on an OpenAI-compatible server, and the figures of it.

`workload` makes the requests, `server` sends one, `drive` sends all, `figures` and `comparison` judge, `text`,
`svg` and `page` show.
"""
