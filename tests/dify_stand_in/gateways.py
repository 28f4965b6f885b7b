"""What stands in front of Dify and responds in its place, as people reported it: 4xx without ``X-Version``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.dify_stand_in.faults import STAND_IN, Fault, respond

if TYPE_CHECKING:
    from aiohttp import web


def gateway(status: int, body: str | dict[str, Any] = "", content_type: str = "text/html") -> Fault:
    """
    Respond as what stands in front of Dify does.

    :param status: the HTTP status.
    :param body: the text; a dict is sent as JSON.
    :param content_type: of a text.
    """
    if isinstance(body, dict):
        return respond(status, json.dumps(body))
    return respond(status, body, content_type=content_type, headers={"Server": "gateway"})


def without_version() -> Fault:
    """Respond as Dify does, through a proxy that removes the header ``X-Version``."""

    async def fault(request: web.Request) -> web.StreamResponse:
        prepare = request._prepare_hook

        # Just before its head is sent: an event stream sends it long before the response is done.
        async def remove_and_prepare(response: web.StreamResponse) -> None:
            response.headers.pop("X-Version", None)
            await prepare(response)

        request._prepare_hook = remove_and_prepare  # type: ignore[method-assign]
        return await request.app[STAND_IN].respond_to(request)

    return fault


def kong_404() -> Fault:
    """Respond as Kong does while it has no route."""
    return gateway(404, {"message": "no Route matched with those values"})


NGINX = "<html><head><title>{0}</title></head><body><center><h1>{0}</h1></center><hr>nginx</body></html>"
CLOUDFLARE = "<!DOCTYPE html><title>Attention Required! | Cloudflare</title><h1>Sorry, you have been blocked</h1>"
SIGN_IN = "<html><title>Sign in</title>Invalid IAP credentials: empty token</html>"

#: 4xx responses of different gateways, none of which says anything about a run, a key or an app.
GATEWAYS: dict[str, Fault] = {
    "kong-404": kong_404(),
    "envoy-404": gateway(404),
    "cloudflare-403-text": gateway(403, "error code: 1010", "text/plain"),
    "cloudflare-403-page": gateway(403, CLOUDFLARE),
    "aws-403": gateway(403, {"message": "Forbidden"}),
    "iap-401": gateway(401, SIGN_IN),
    "nginx-404": gateway(404, NGINX.format("404 Not Found")),
    "nginx-400": gateway(400, NGINX.format("400 Bad Request")),
    "google-403": gateway(403, {"error": {"code": 403, "message": "denied", "status": "PERMISSION_DENIED"}}),
    "apisix-404": gateway(404, {"error_msg": "404 Route Not Found"}),
    "spring-404": gateway(
        404, {"timestamp": "2026-12-01T00:00:00Z", "status": 404, "error": "Not Found", "path": "/v1/workflows/run"}
    ),
    # Nearly as Dify's errors: the code is a number; the status is another one, or is missing.
    "code-401": gateway(401, {"code": 401, "message": "Missing Authentication", "status": 401}),
    "status-404": gateway(404, {"code": "not_found", "message": "no such upstream", "status": 502}),
    "no-status-403": gateway(403, {"code": "forbidden", "message": "blocked by policy"}),
}
