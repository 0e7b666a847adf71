"""How the Hub on loopback answers: its routes, and what a test makes fail."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_repos import LFS_SIZE, TOKEN, Blob, Repo, Request, git_sha1

if TYPE_CHECKING:
    from hub_server import HubServer


class LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed go away in mid-answer."""


class _Reset(Exception):
    pass


def handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"hub": hub})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        hub = self.hub
        if hub.latency:
            time.sleep(hub.latency)
        length = int(self.headers.get("content-length") or 0)
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        authorised = self.headers.get("authorization") == f"Bearer {TOKEN}"
        host = (self.headers.get("host") or "").split(":")[0]
        self.authorised = authorised
        request = Request(self.command, parts.path, self.headers.get("range"), "authorization" in self.headers, host)
        if parts.path != "/api/agent-harnesses":  # the client's own housekeeping, at a moment of its choosing
            with hub.lock:
                hub.requests.append(request)
        self.short = 0
        self.manner = ""
        self.other_commit = False
        self.wrong_range = False
        try:
            self._maybe_fail(parts.path, length)
            body = b"" if self.command == "PUT" else self.rfile.read(length)
            self._route(unquote(parts.path), body, length)
        except _Answered:
            pass
        except (_Reset, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _maybe_fail(self, path: str, length: int) -> None:
        for fault in list(self.hub.faults):
            if fault.where.search(f"{self.command} {path}") is None:
                continue
            with self.hub.lock:
                if fault.after > 0:
                    fault.after -= 1
                    continue
                if fault.times <= 0:
                    continue
                fault.times -= 1
            if fault.kind == "page":
                self.rfile.read(length)
                self._bytes(b"<html>Sign in to the network</html>", 200, {"Content-Type": "text/html"})
                raise _Answered
            if fault.kind == "status":
                self.rfile.read(length)
                self._json({"error": "made to fail"}, fault.status, fault.headers)
                raise _Answered
            if fault.kind == "reset":
                raise _Reset
            if fault.kind == "short":
                self.short = 1
            elif fault.kind in ("trickle", "broken", "flip"):
                self.manner = fault.kind
            elif fault.kind == "moved":
                self.other_commit = True
            elif fault.kind == "wrong-range":
                self.wrong_range = True
            elif fault.kind == "call" and fault.action is not None:
                fault.action()

    # Answers.

    def _json(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _bytes(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._json({"error": message or code}, status, {**headers, "X-Error-Message": message or code})

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.authorised):
            self._refuse(404 if self.authorised else 401, "RepoNotFound", "Repository not found")
            raise _Answered
        if "authorization" in self.headers and not self.authorised:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            raise _Answered
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        oid = repo.refs.get(revision) or repo.tags.get(revision) or (revision if revision in repo.commits else None)
        if oid is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            raise _Answered
        return oid

    # Requests.

    def _route(self, path: str, body: bytes, length: int) -> None:
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method:
                getattr(self, handle)(*match.groups(), *((length,) if self.command == "PUT" else (body,)))
                return
        self._refuse(404, "", f"no such page: {self.command} {path}")

    def _info(self, name: str, *rest: Any) -> None:
        repo = self._repo(name)
        oid = self._commit(repo, rest[0] if len(rest) == 2 else "main")
        siblings = [
            {"rfilename": path, **({"size": blob.size, "blobId": blob.git_sha1} if "blobs" in self.query else {}),
             **({"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}}
                if blob.sha256 and "blobs" in self.query else {})}
            for path, blob in repo.commits[oid].items()
        ]  # fmt: skip
        document = {"_id": "1", "id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
        self._json({**document, "cardData": repo.card, "gated": "manual" if repo.gated else False})

    def _resolve(self, name: str, rest: str, body: bytes) -> None:
        repo = self._repo(name)
        revision, _, path = rest.partition("/")
        if revision == "refs":
            number, path = path.removeprefix("pr/").split("/", 1)
            revision = f"refs/pr/{number}"
        oid = self._commit(repo, unquote(revision))
        blob = repo.commits[oid].get(path)
        stated = "0" * 40 if self.other_commit else oid
        if repo.gated and not self.authorised:
            self._refuse(401, "GatedRepo", "Access to this model is restricted")
            return
        if blob is None:
            self._bytes(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": stated})
            return
        headers = {"X-Repo-Commit": stated, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.sha256 is not None:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            if self.hub.xet:
                repo_url = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{oid}"
                headers |= {"X-Xet-Hash": self.hub.xet_hash(blob.sha256), "Link": f'<{repo_url}>; rel="xet-auth"'}
            if self.hub.redirect:
                location = f"{self.hub.storage}/storage/{blob.sha256}?signature={self.hub.signature}"
                self._bytes(b"", 302, {**headers, "Location": location})
                return
        self._content(blob, headers)

    def _stored(self, oid: str, body: bytes) -> None:
        if "authorization" in self.headers:
            self._refuse(400, "", "storage takes no token")
        elif self.query.get("signature") != self.hub.signature:
            self._refuse(403, "", "expired")
        else:
            self._content(Blob((self.hub.store / oid).stat().st_size, "", oid), {"ETag": '"storage"'})

    def _content(self, blob: Blob, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range") or "")
        first, last = (int(asked[1]), min(int(asked[2]), blob.size - 1)) if asked else (0, blob.size - 1)
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if asked:
            total = blob.size + 1 if self.wrong_range else blob.size
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command == "HEAD":
            return
        count = max(1, (last - first + 1) // 2) if self.short else last - first + 1
        self.wfile.flush()
        if self.manner:
            self._oddly(blob, first, count)
        elif blob.sha256 is None:
            self.wfile.write(blob.content[first : first + count])
        else:
            with open(self.hub.store / blob.sha256, "rb") as stream:
                while count:
                    sent = os.sendfile(self.connection.fileno(), stream.fileno(), first, count)
                    first, count = first + sent, count - sent
        if self.short:
            self.close_connection = True

    def _oddly(self, blob: Blob, first: int, count: int) -> None:
        """Send a file's bytes one by one without end, or half of them and a reset, or with a bit flipped."""
        content = blob.content if blob.sha256 is None else (self.hub.store / blob.sha256).read_bytes()
        content = content[first : first + count]
        if self.manner == "flip":
            self.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))
        elif self.manner == "broken":
            self.wfile.write(content[: min(50_000, max(1, count - 1))])
            time.sleep(0.05)  # what arrived before a reset is read before it
            raise _Reset
        else:
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(0.2)

    def _paths_info(self, name: str, revision: str, body: bytes) -> None:
        repo = self._repo(name)
        tree = repo.commits[self._commit(repo, revision)]
        if self.headers.get("content-type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        self._json([self._describe(path, tree[path]) for path in paths if path in tree])

    def _describe(self, path: str, blob: Blob) -> dict[str, Any]:
        document: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_sha1}
        if blob.sha256 is not None:
            document["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
            document["xetHash"] = self.hub.xet_hash(blob.sha256)
        return document

    def _tree_page(self, name: str, revision: str, body: bytes) -> None:
        repo = self._repo(name)
        tree = repo.commits[self._commit(repo, revision)]
        self._json([self._describe(path, blob) for path, blob in sorted(tree.items())])

    def _refs(self, name: str, body: bytes) -> None:
        repo = self._repo(name)
        self._json({
            "branches": [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
                         for ref, oid in repo.refs.items() if not ref.startswith("refs/")],
            "converts": [], "tags": [], "pullRequests": [],
        })  # fmt: skip

    def _whoami(self, body: bytes) -> None:
        if not self.authorised:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        else:
            self._json({"type": "user", "name": "canary", "orgs": [], "auth": {}})

    def _writable(self, name: str) -> Repo:
        if not self.authorised:
            self._refuse(401, "", "Invalid username or password.")
            raise _Answered
        return self._repo(name)

    def _create_repo(self, body: bytes) -> None:
        if not self.authorised:
            self._refuse(401, "", "Invalid username or password.")
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'canary'}/{asked['name']}"
        if asked.get("organization") == "forbidden":
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
            return
        with self.hub.lock:
            if name in self.hub.repos:
                self._json({"url": f"{self.hub.endpoint}/{name}", "error": "exists"}, 409)
                return
            private = asked.get("private", False) or asked.get("visibility") == "private"
            self.hub.create(name, private=private)
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "1"})

    def _validate_yaml(self, body: bytes) -> None:
        errors = [{"message": text} for text in self.hub.card_errors]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        repo = self._writable(name)
        tree = repo.commits[self._commit(repo, revision)]
        files = []
        for file in json.loads(body)["files"]:
            path, size = file["path"], file["size"]
            mode = "lfs" if size > LFS_SIZE or path.endswith(".safetensors") else "regular"
            oid = tree[path].etag if path in tree else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})})
        self._json({"files": files})

    def _lfs_batch(self, name: str, body: bytes) -> None:
        repo = self._writable(name)
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if self.hub.quota_message:
                objects.append({**entry, "error": {"code": 403, "message": self.hub.quota_message}})
                continue
            if item["oid"] not in repo.lfs:
                upload = {"href": f"{self.hub.storage}/upload/{quote(name, safe='')}/{item['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/api/verify/{name}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, name: str, oid: str, length: int) -> None:
        part = self.hub.store / f"{oid}.{threading.get_ident()}"
        digest, left = hashlib.sha256(), length
        with open(part, "wb") as stream:
            while left:
                piece = self.rfile.read(min(left, 1 << 20))
                if not piece:
                    part.unlink()
                    raise _Reset
                digest.update(piece)
                stream.write(piece)
                left -= len(piece)
        if digest.hexdigest() != oid:
            part.unlink()
            self._refuse(400, "", "digest differs")
            return
        part.replace(self.hub.store / oid)
        with self.hub.lock:
            self.hub.uploads.append(oid)
            self.hub.repos[unquote(name)].lfs.add(oid)
        self._bytes(b"")

    def _verify(self, name: str, body: bytes) -> None:
        asked = json.loads(body)
        present = asked["oid"] in self._writable(name).lfs
        self._json({}, 200 if present else 404)

    def _duplicate(self, source: str, body: bytes) -> None:
        repo, asked = self._repo(source), json.loads(body)
        target = self._writable(asked["target"]["name"])
        failed = [
            {"sha256": file["sha256"], "error": "not there"}
            for file in asked["files"]
            if file["sha256"] not in repo.lfs
        ]
        target.lfs |= {file["sha256"] for file in asked["files"]} & repo.lfs
        self._json({"failed": failed})

    def _commit_call(self, name: str, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        with self.hub.lock:
            repo = self._writable(name)
            head = self._commit(repo, revision)
            if header.get("parentCommit") not in (None, head):
                self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
                return
            tree = dict(repo.commits[head])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    tree[value["path"]] = Blob(len(content), git_sha1(content), None, content)
                elif line["key"] == "lfsFile":
                    oid = value["oid"]
                    if oid not in repo.lfs and not self.hub.in_xet(oid):
                        self._refuse(400, "", f"an LFS pointer pointed to a file that does not exist: {oid}")
                        return
                    stored = self.hub.store / oid
                    size = stored.stat().st_size if stored.exists() else value["size"]
                    pointer = git_sha1(f"pointer {value['oid']} {size}".encode())
                    tree[value["path"]] = Blob(size, pointer, value["oid"])
                elif line["key"] == "deletedFile":
                    tree.pop(value["path"], None)
            if self.query.get("create_pr") == "1":
                number = len(repo.discussions) + 1
                ref = f"refs/pr/{number}"
                repo.refs[ref] = head
                discussion = {"num": number, "title": header["summary"], "status": "open", "isPullRequest": True}
                discussion |= {"createdAt": "2026-01-01T00:00:00.000Z", "author": {"name": "canary"}}
                repo.discussions.append({**discussion, "repo": {"name": name, "type": "model"}})
                url = f"{self.hub.endpoint}/{name}/discussions/{number}"
            else:
                ref, url = revision, None
            oid = self.hub.add_commit(repo, ref, tree, header["summary"])
        self._maybe_fail(f"{self.path}#done", 0)
        self._json({
            "success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}",
            **({"pullRequestUrl": url} if url else {}),
        })  # fmt: skip

    def _discussions(self, name: str, body: bytes) -> None:
        found = [
            item for item in self._repo(name).discussions if self.query.get("status", item["status"]) == item["status"]
        ]
        self._json({"discussions": found, "count": len(found), "start": 0})

    def _branch(self, name: str, branch: str, body: bytes) -> None:
        repo = self._writable(name)
        if branch in repo.refs:
            self._refuse(409, "", "exists")
            return
        repo.refs[branch] = repo.refs["main"]
        self._json({})

    def _tag(self, name: str, revision: str, body: bytes) -> None:
        repo = self._writable(name)
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            self._refuse(409, "", "exists")
            return
        repo.tags[tag] = self._commit(repo, revision)
        self._json({})

    def _xet_token(self, name: str, kind: str, revision: str, body: bytes) -> None:
        self._writable(name) if kind == "write" else self._repo(name)
        cas = f"local://{self.hub.folder / 'xet'}"
        expires = str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires}
        self._json({"casUrl": cas, "accessToken": "xet", "exp": int(expires)}, 200, headers)


class _Answered(Exception):
    """The request has been answered already."""


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[tuple[str, ...], str, str]] = [
    (("GET",), rf"/api/models/{_NAME}", "_info"),
    (("GET",), rf"/api/models/{_NAME}/revision/(.+)", "_info"),
    (("POST",), rf"/api/models/{_NAME}/paths-info/(.+)", "_paths_info"),
    (("GET",), rf"/api/models/{_NAME}/tree/(.+)", "_tree_page"),
    (("GET",), rf"/api/models/{_NAME}/refs", "_refs"),
    (("GET",), rf"/api/models/{_NAME}/discussions", "_discussions"),
    (("POST",), rf"/api/models/{_NAME}/preupload/(.+)", "_preupload"),
    (("POST",), rf"/api/models/{_NAME}/commit/(.+)", "_commit_call"),
    (("POST",), rf"/api/models/{_NAME}/tag/(.+)", "_tag"),
    (("POST",), rf"/api/models/{_NAME}/branch/(.+)", "_branch"),
    (("POST",), rf"/api/models/{_NAME}/lfs-files/duplicate", "_duplicate"),
    (("GET",), rf"/api/models/{_NAME}/xet-(read|write)-token/(.+)", "_xet_token"),
    (("GET",), r"/api/whoami-v2", "_whoami"),
    (("POST",), r"/api/repos/create", "_create_repo"),
    (("POST",), r"/api/validate-yaml", "_validate_yaml"),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", "_lfs_batch"),
    (("PUT",), r"/upload/([\w.-]+/[\w.-]+)/(\w+)", "_upload"),
    (("POST",), rf"/api/verify/{_NAME}", "_verify"),
    (("GET", "HEAD"), r"/storage/(\w+)", "_stored"),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/(.+)", "_resolve"),
]
