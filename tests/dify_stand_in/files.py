"""The files of the stand-in: signed addresses that expire, as Dify 1.16.1 gives them for the files among outputs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from aiohttp import web

from tests.dify_stand_in.recordings import json_response

if TYPE_CHECKING:
    from tests.dify_stand_in.server import DifyStandIn

_SECRET = os.urandom(16)


@dataclass(frozen=True)
class _File:
    name: str
    content: bytes
    mime_type: str


class Files:
    """
    What the stand-in signs and serves.

    :param stand_in: what has the settings and the uploads.
    """

    def __init__(self, stand_in: DifyStandIn) -> None:
        self.stand_in = stand_in
        self._made: dict[str, _File] = {}
        #: How many downloads are served at this moment, and were at most.
        self.active = self.most_active = 0

    def make(self, name: Any, content: bytes, mime_type: str = "text/plain") -> dict[str, Any]:
        """
        Return the object of a file that a tool made, as it stands among a run's outputs.

        :param name: what the object says, which may be anything.
        :param content: its bytes.
        :param mime_type: its type.
        """
        file_id = str(uuid.uuid4())
        self._made[file_id] = _File(name, content, mime_type)
        ending = PurePath(str(name)).suffix or ".bin"
        path = f"/files/tools/{file_id}{quote(ending)}"
        # Not escaped in the recordings, unlike that of an upload.
        return self._object(file_id, self._made[file_id], "tool_file", path, quote(self._sign(file_id), safe="=?&"))

    def uploaded(self, file_id: str) -> dict[str, Any]:
        """Return the object of an uploaded file, as it stands among a run's inputs and outputs."""
        name, content = self.stand_in.uploads[file_id]
        file = _File(name, content, self.stand_in.upload_types[file_id])
        return self._object(file_id, file, "local_file", f"/files/{file_id}/file-preview", quote(self._sign(file_id)))

    def shown(self, value: Any) -> Any:
        """Return inputs as the record of a run shows them: with the objects of the uploaded files in them."""
        if isinstance(value, dict) and value.get("upload_file_id") in self.stand_in.uploads:
            return self.uploaded(value["upload_file_id"])
        if isinstance(value, dict):
            return {name: self.shown(item) for name, item in value.items()}
        return [self.shown(item) for item in value] if isinstance(value, list) else value

    def _object(self, file_id: str, file: _File, method: str, path: str, sign: str) -> dict[str, Any]:
        timestamp, nonce = self._last_signed
        query = f"timestamp={timestamp}&nonce={nonce}&sign={sign}"
        return {
            "dify_model_identity": "__dify__file__",
            "id": None,
            "type": "document",
            "transfer_method": method,
            "remote_url": "" if method == "local_file" else None,
            "filename": file.name,
            "extension": PurePath(str(file.name)).suffix,
            "mime_type": file.mime_type,
            "size": len(file.content),
            "related_id": file_id,
            "url": f"{self.stand_in.files_url}{path}?{query}",
        }

    def _sign(self, file_id: str) -> str:
        timestamp, nonce = int(time.time() - self.stand_in.files_age), os.urandom(16).hex()
        self._last_signed = timestamp, nonce
        return _signature(file_id, str(timestamp), nonce)

    async def respond(self, request: web.Request) -> web.StreamResponse:
        """Serve a file, if its signature is right and lives; nobody needs a key for that."""
        *_, last = request.path.split("/")
        is_made = request.path.startswith("/files/tools/")
        file_id = last.partition(".")[0] if is_made else request.path.split("/")[2]
        timestamp, nonce = request.query.get("timestamp", ""), request.query.get("nonce", "")
        is_signed = hmac.compare_digest(request.query.get("sign", ""), _signature(file_id, timestamp, nonce))
        if not is_signed or time.time() - int(timestamp) > self.stand_in.files_lifetime:
            status = 403 if is_made else 404
            return json_response({"code": "forbidden" if is_made else "not_found", "status": status}, status=status)
        name, content = self.stand_in.uploads.get(file_id) or ("", b"")
        file = self._made.get(file_id) or _File(name, content, "application/octet-stream")
        headers = {"Content-Type": file.mime_type, "Content-Length": str(len(file.content))}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        try:
            await response.write(file.content)
            await asyncio.sleep(0)
        finally:
            self.active -= 1
        return response


def _signature(file_id: str, timestamp: str, nonce: str) -> str:
    digest = hmac.new(_SECRET, f"file-preview|{file_id}|{timestamp}|{nonce}".encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode()
