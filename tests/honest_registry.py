"""What a registry keeps and what it answers (OCI distribution specification 1.1), in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Literal

import msgspec

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

_API = re.compile(r"/v2/(?P<name>.+)/(?P<kind>blobs|manifests|tags|referrers)/(?P<rest>.*)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """As it arrived; header names in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What to send, and how badly.

    `length` is what Content-Length claims (None: chunked instead). After `stop_at` bytes of
    the body comes what `then` says; `pace` is (bytes, seconds between them). An `endless`
    body repeats.
    """

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""
    length: int | None = None
    is_chunked: bool = False
    stop_at: int | None = None
    then: Literal["end", "close", "stall"] = "end"
    is_endless: bool = False
    pace: tuple[int, float] | None = None


class Manifest(msgspec.Struct, frozen=True):
    media_type: str
    body: bytes


def digest_name(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def error(status: int, code: str, message: str = "", **headers: str) -> Reply:
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    return Reply(status=status, headers={"content-type": "application/json", **headers}, body=body)


class Contents:
    """Blobs (shared by all repositories), manifests, tags and uploads under way.

    Without `referrers_api` it is a registry of the time before 1.1: no list of referrers, no
    OCI-Subject, so that clients must keep the fallback tag.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], Manifest] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.uploads: dict[str, bytearray] = {}
        self.referrers_api = True
        self._ids = itertools.count(1)

    def add_blob(self, data: bytes) -> str:
        """Its digest."""
        self.blobs[digest_name(data)] = data
        return digest_name(data)

    def add_manifest(
        self,
        repository: str,
        manifest: bytes | dict[str, object],
        *,
        tag: str | None = None,
        media_type: str = OCI_MANIFEST,
    ) -> str:
        """Its digest. A dict is written as JSON."""
        body = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        digest = digest_name(body)
        self.manifests[repository, digest] = Manifest(media_type, body)
        if tag is not None:
            self.tags[repository, tag] = digest
        return digest

    def manifest(self, repository: str, reference: str) -> Manifest | None:
        digest = self.tags.get((repository, reference), reference)
        return self.manifests.get((repository, digest))

    def reply(self, request: Request) -> Reply:
        """The honest answer to a request of the API."""
        if request.path == "/v2/":
            return Reply(status=200, body=b"{}")
        found = _API.fullmatch(request.path)
        if found is None:
            return error(404, "UNSUPPORTED", request.path)
        name, kind, rest = found["name"], found["kind"], found["rest"]
        if kind == "blobs":
            if rest.startswith("uploads/"):
                return self._upload(request, name, rest.removeprefix("uploads/"))
            return self._blob(request, rest)
        if kind == "manifests":
            return self._manifest(request, name, rest)
        if kind == "tags":
            tags = sorted(tag for repository, tag in self.tags if repository == name)
            return _json({"name": name, "tags": tags})
        return self._referrers(request, name, rest)

    def _blob(self, request: Request, digest: str) -> Reply:
        data = self.blobs.get(digest)
        if data is None or request.method not in ("GET", "HEAD"):
            return error(404, "BLOB_UNKNOWN", digest)
        headers = {"docker-content-digest": digest, "accept-ranges": "bytes"}
        asked = _RANGE.fullmatch(request.headers.get("range", ""))
        if asked is None:
            return Reply(status=200, headers=headers, body=data)
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        if first >= len(data):
            return Reply(status=416, headers={"content-range": f"bytes */{len(data)}"})
        last = min(last, len(data) - 1)
        headers["content-range"] = f"bytes {first}-{last}/{len(data)}"
        return Reply(status=206, headers=headers, body=data[first : last + 1])

    def _manifest(self, request: Request, name: str, reference: str) -> Reply:
        if request.method == "PUT":
            media_type = request.headers.get("content-type", OCI_MANIFEST)
            tag = None if reference.startswith("sha256:") else reference
            if tag is None and digest_name(request.body) != reference:
                return error(400, "DIGEST_INVALID", reference)
            digest = self.add_manifest(name, request.body, tag=tag, media_type=media_type)
            headers = {"location": f"/v2/{name}/manifests/{digest}"}
            subject = json.loads(request.body).get("subject")
            if subject is not None and self.referrers_api:
                headers["oci-subject"] = subject["digest"]
            return Reply(status=201, headers=headers)
        manifest = self.manifest(name, reference)
        if manifest is None:
            return error(404, "MANIFEST_UNKNOWN", reference)
        headers = {
            "content-type": manifest.media_type,
            "docker-content-digest": digest_name(manifest.body),
        }
        return Reply(status=200, headers=headers, body=manifest.body)

    def _referrers(self, request: Request, name: str, digest: str) -> Reply:
        if not self.referrers_api:
            return error(404, "UNSUPPORTED")
        wanted = request.query.get("artifactType")
        listed: list[dict[str, object]] = []
        for (repository, own_digest), manifest in self.manifests.items():
            content = json.loads(manifest.body)
            if repository != name or (content.get("subject") or {}).get("digest") != digest:
                continue
            artifact_type = content.get("artifactType") or content["config"]["mediaType"]
            if wanted in (None, artifact_type):
                listed.append(
                    {
                        "mediaType": manifest.media_type,
                        "digest": own_digest,
                        "size": len(manifest.body),
                        "artifactType": artifact_type,
                    }
                )
        headers = {"oci-filters-applied": "artifactType"} if wanted else {}
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
        return _json(index, content_type=OCI_INDEX, **headers)

    def _upload(self, request: Request, name: str, upload: str) -> Reply:
        if request.method == "POST" and not upload:
            mount = request.query.get("mount")
            if mount in self.blobs:
                return Reply(status=201, headers={"location": f"/v2/{name}/blobs/{mount}"})
            upload = str(next(self._ids))
            self.uploads[upload] = bytearray()
            if "digest" not in request.query:
                return self._progress(202, name, upload)
        kept = self.uploads.get(upload)
        if kept is None:
            return error(404, "BLOB_UPLOAD_UNKNOWN", upload)
        if request.method == "GET":
            return self._progress(204, name, upload)
        begin = request.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
        if begin and int(begin) != len(kept):
            return self._progress(416, name, upload)
        kept += request.body
        if request.method == "PATCH":
            return self._progress(202, name, upload)
        del self.uploads[upload]
        if digest_name(bytes(kept)) != request.query.get("digest"):
            return error(400, "DIGEST_INVALID")
        digest = self.add_blob(bytes(kept))
        return Reply(status=201, headers={"location": f"/v2/{name}/blobs/{digest}"})

    def _progress(self, status: int, name: str, upload: str) -> Reply:
        last = max(0, len(self.uploads[upload]) - 1)
        return Reply(
            status=status,
            headers={
                "location": f"/v2/{name}/blobs/uploads/{upload}?_state=kept",
                "range": f"0-{last}",
            },
        )


def _json(value: object, *, content_type: str = "application/json", **headers: str) -> Reply:
    return Reply(
        status=200,
        headers={"content-type": content_type, **headers},
        body=json.dumps(value).encode(),
    )
