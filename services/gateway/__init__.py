"""Gateway: the only public door.

Owns nothing that lasts. Serves the web page, the merged API document, `GET /api/v1/home`, and every route of the other
services (`upstreams.py`), which it passes on after it has checked token, rate and size. Consumes and produces nothing.
"""
