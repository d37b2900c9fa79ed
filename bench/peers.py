"""Plain proxies as one would write them in an afternoon: `python bench/peers.py aiohttp|fastapi PORT UPSTREAM`."""

import sys

_kind, _port, _upstream = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def plain_aiohttp() -> None:
    import aiohttp
    from aiohttp import web

    session: aiohttp.ClientSession

    async def start(_app: web.Application) -> None:
        nonlocal session
        session = aiohttp.ClientSession(auto_decompress=False)

    async def pass_on(request: web.Request) -> web.StreamResponse:
        async with session.request(request.method, _upstream + request.raw_path, headers=request.headers) as answer:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    app = web.Application()
    app.on_startup.append(start)
    app.router.add_route("*", "/{path:.*}", pass_on)
    web.run_app(app, host="127.0.0.1", port=_port, access_log=None, print=None)


def fastapi_httpx() -> None:
    import httpx
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app = FastAPI()
    client = httpx.AsyncClient(limits=httpx.Limits(max_connections=200, max_keepalive_connections=200))

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def pass_on(path: str, request: Request) -> Response:
        answer = await client.request(
            request.method, f"{_upstream}/{path}", headers=dict(request.headers), content=await request.body()
        )
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    uvicorn.run(app, host="127.0.0.1", port=_port, access_log=False, log_level="warning")


{"aiohttp": plain_aiohttp, "fastapi": fastapi_httpx}[_kind]()
