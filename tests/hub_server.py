"""A stand-in for the Hugging Face Hub on this machine: as much of its API as a download and a commit need.

    with hub() as server:      HF_ENDPOINT=server.url
        server.repos["org/model"] = {"config.json": b"{}"}

Repositories are dicts of files. What clients sent is in `server.seen`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = (".safetensors",)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.seen: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.refuses: int | None = None  # status of every commit

    def sha(self, repo):
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.repos[repo].items())
        return hashlib.sha1(json.dumps([repo, content]).encode()).hexdigest()


@contextlib.contextmanager
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(name, data):
    if name.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def answer(self, status=200, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self):
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def split(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.seen.append((self.command, path))
        self.server.tokens.add(self.headers.get("authorization", ""))
        return path.split("/")

    def repository(self, parts):
        repo = "/".join(parts[:2])
        if repo in self.server.gated:
            self.fail(403, "GatedRepo", f"Access to model {repo} is restricted")
        elif repo not in self.server.repos:
            self.fail(401, "RepoNotFound", "Repository not found")
        else:
            return repo
        return None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.split()
        if parts[:2] == ["api", "models"]:
            repo = self.repository(parts[2:])
            if repo is None:
                return
            kind, *rest = parts[4:] or ["info"]
            files, sha = self.server.repos[repo], self.server.sha(repo)
            if rest and rest[0] not in ("main", sha):
                self.fail(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
            elif kind == "tree":
                self.answer(200, [self.described(name, data) for name, data in files.items()])
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings})
        elif parts[2:3] == ["resolve"]:
            repo = self.repository(parts)
            name = "/".join(parts[4:])
            if repo is None:
                return
            if name not in self.server.repos[repo]:
                self.fail(404, "EntryNotFound", "Entry not found")
                return
            data = self.server.repos[repo][name]
            quoted = f'"{etag(name, data)}"'
            self.answer(200, data, ETag=quoted, X_Repo_Commit=self.server.sha(repo))
        else:
            self.fail(404, "", f"the stand-in has no {self.path}")

    def described(self, name, data):
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith(LFS):
            entry["lfs"] = {"oid": etag(name, data), "size": len(data), "pointerSize": 130}
        return entry

    def do_PUT(self):
        parts = self.split()
        self.server.objects[parts[-1]] = self.body()
        self.answer(200)

    def do_POST(self):
        parts, body = self.split(), self.body()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = repo in self.server.repos
            self.server.repos.setdefault(repo, {})
            self.server.private.setdefault(
                repo, "private" in (asked.get("visibility"), asked.get("private") and "private")
            )
            self.answer(409 if known else 200, {"url": f"{self.server.url}/{repo}", "id": repo})
        elif parts == ["api", "validate-yaml"]:
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[-1] == "batch":
            objects = json.loads(body)["objects"]
            href = f"{self.server.url}/lfs/"
            actions = [{**one, "actions": {"upload": {"href": href + one["oid"]}}} for one in objects]
            self.answer(200, {"transfer": "basic", "objects": actions})
        elif "preupload" in parts:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "commit" in parts:
            self.commit("/".join(parts[2:4]), body)
        else:
            self.fail(404, "", f"the stand-in has no {self.path}")

    def commit(self, repo, body):
        if self.server.refuses is not None:
            said = f"no write access with {self.headers.get('authorization')}"
            self.fail(self.server.refuses, "", said)
            return
        files, message, changed = dict(self.server.repos[repo]), "", []
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                continue
            changed.append(f"{entry['key']} {value['path']}")
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.server.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repos[repo] = files
        self.server.commits.append((repo, message, changed))
        sha = self.server.sha(repo)
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})
