"""A Hugging Face Hub on loopback, for the real huggingface_hub client: as much of it as skillmerge uses.

    with HubServer(tmp_path) as hub:
        hub.create("acme/rl", {"config.json": b"{}", "model.safetensors": path})
        with hub.environment(): ...

Repositories with commits, branches and pull requests; files with git or LFS digests; downloads with ranges,
by a redirect to a storage address that takes no token; uploads by LFS or by xet (a `local://` store); one
commit call. Every request is counted, and can be made to fail: see `fail`.

Its answers follow what the client asks for and reads (huggingface_hub 1.20 to 2.4), not a description of the
real thing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_answers import LoopbackServer, handler_of
from hub_repos import LFS_SIZE, TOKEN, Blob, Fault, Repo, Request, git_sha1


class HubServer:
    """`endpoint` is the Hub's address, `storage` that of its large files."""

    def __init__(self, folder: Path, *, redirect: bool = True, xet: bool = False, latency: float = 0.0) -> None:
        self.folder, self.redirect, self.xet, self.latency = folder, redirect, xet, latency
        self.store = folder / "store"
        self.store.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.uploads: list[str] = []
        """Digests of files whose bytes were sent, in order."""
        self.signature = "s1"
        """What storage addresses are signed with; change it, and the old ones expire."""
        self.xet_hashes: dict[str, str] = {}
        """sha256 -> what the xet store calls the same file."""
        self.card_errors: list[str] = []
        self.quota_message = ""
        self.lock = threading.RLock()
        self._server = LoopbackServer(("127.0.0.1", 0), handler_of(self))
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def variables(self, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process that uses this Hub and nothing else."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / "hf-home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token}

    # What a test puts in and looks at.

    def create(self, name: str, files: dict[str, bytes | Path] | None = None, **attributes: Any) -> str:
        """A repository with one commit. Returns the commit."""
        self.repos[name] = Repo(**attributes)
        return self.commit(name, files or {".gitattributes": b"*.safetensors filter=lfs\n"})

    def create_from(self, name: str, folder: Path, **attributes: Any) -> str:
        """A repository with the files of a folder."""
        files: dict[str, bytes | Path] = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        return self.create(name, files, **attributes)

    def commit(self, name: str, files: dict[str, bytes | Path | None], ref: str = "main") -> str:
        """Add files to (or with None remove them from) a branch."""
        repo = self.repos[name]
        tree = dict(repo.commits.get(repo.refs.get(ref, ""), {}))
        for path, content in files.items():
            if content is None:
                del tree[path]
            else:
                tree[path] = self.blob(path, content)
                if (oid := tree[path].sha256) is not None:
                    repo.lfs.add(oid)
        return self.add_commit(repo, ref, tree, "a commit")

    def add_commit(self, repo: Repo, ref: str, tree: dict[str, Blob], message: str) -> str:
        parent = repo.refs.get(ref)
        seed = json.dumps([parent, message, sorted((path, blob.etag) for path, blob in tree.items())])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        repo.commits[oid], repo.parents[oid], repo.messages[oid] = tree, parent, message
        repo.refs[ref] = oid
        return oid

    def blob(self, path: str, content: bytes | Path) -> Blob:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size <= LFS_SIZE and not path.endswith(".safetensors"):
            data = content if isinstance(content, bytes) else content.read_bytes()
            return Blob(size, git_sha1(data), None, data)
        if isinstance(content, bytes):
            oid = hashlib.sha256(content).hexdigest()
            (self.store / oid).write_bytes(content)
        else:
            with open(content, "rb") as stream:
                digest = hashlib.sha256()
                while piece := stream.read(1 << 20):
                    digest.update(piece)
            oid = digest.hexdigest()
            if not (self.store / oid).exists():
                try:
                    os.link(content, self.store / oid)
                except OSError:
                    shutil.copyfile(content, self.store / oid)
        return Blob(size, git_sha1(f"pointer {oid} {size}".encode()), oid)

    def xet_hash(self, sha256: str) -> str:
        return self.xet_hashes.get(sha256, sha256)

    def in_xet(self, sha256: str) -> bool:
        """Whether the xet store has a file of that sha256, which its shards hold with every 8 bytes reversed."""
        raw = bytes.fromhex(sha256)
        written = b"".join(raw[start : start + 8][::-1] for start in range(0, 32, 8))
        shards = (self.folder / "xet").rglob("*.mdb")
        return self.xet and any(written in shard.read_bytes() for shard in shards)

    def tree(self, name: str, ref: str = "main") -> dict[str, Blob]:
        repo = self.repos[name]
        return repo.commits[repo.refs.get(ref, ref)]

    def content(self, name: str, path: str, ref: str = "main") -> bytes:
        blob = self.tree(name, ref)[path]
        return blob.content if blob.sha256 is None else (self.store / blob.sha256).read_bytes()

    def fail(self, kind: str, where: str, *, times: int = 1, **details: Any) -> None:
        """Make requests whose "METHOD path" matches `where` fail.

        kind: status, reset, page (some proxy's), short, moved (the commit header is another one), wrong-range, or
        call (run `action`, then answer).
        """
        self.faults.append(Fault(kind, re.compile(where), times, **details))

    def count(self, where: str) -> int:
        return sum(re.search(where, f"{request.method} {request.path}") is not None for request in self.requests)

    @contextmanager
    def environment(self, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> Iterator[None]:
        """Make this process's huggingface_hub use this Hub."""
        from huggingface_hub import constants
        from huggingface_hub.utils import close_session

        with monkeypatch.context() as patch:
            for name, value in self.variables(token).items():
                patch.setenv(name, value)
            if token is None:
                patch.delenv("HF_TOKEN", raising=False)
            home = self.folder / "hf-home"
            patch.setattr(constants, "ENDPOINT", self.endpoint)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr(constants, "HF_HOME", str(home))
            patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
            patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
            patch.setattr(constants, "HF_HUB_DISABLE_XET", not self.xet)
            patch.setattr("huggingface_hub.hf_api.api.endpoint", self.endpoint)
            close_session()
            yield
            close_session()
