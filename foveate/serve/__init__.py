"""An HTTP server that speaks OpenAI's chat protocol about pictures, videos and attached cameras.

edge.py       what every request passes: host, key, body size, time
schemas.py    what requests and replies look like
media.py      what may be read, and what it may be like; remote.py fetches it
streams.py    attached cameras
worker.py     the one thread that touches the model
answering.py  a request becomes a question, media become tokens, tokens an answer
metrics.py    counts and quantiles for Prometheus
app.py        the routes
"""
