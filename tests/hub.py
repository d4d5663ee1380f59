"""A Hugging Face hub on this machine: the part of its API that HfApi and HfFileSystem use, kept in memory.

https://huggingface.co/docs/hub/api
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

from gcs import Answers


class Server(http.server.ThreadingHTTPServer):
    """Attributes: repositories, {"owner/name": {revision: {path: bytes}}}; commits, [(repository, revision)]; url."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), Handler)
        self.repositories, self.commits, self.large = {}, [], {}
        self.url = f"http://localhost:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(Answers):
    def missing(self, what):
        self.answer(404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound")

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        for method, pattern, function in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return function(self, **match.groupdict())
        return self.answer(501, {"error": f"the tests' hub has no {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def create(self):
        about = json.loads(self.body)
        name = f"{about['organization']}/{about['name']}"
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, {"main": {}})
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def branch(self, repository, revision):
        branches = self.server.repositories[repository]
        known = revision in branches
        branches.setdefault(revision, dict(branches["main"]))
        self.answer(409 if known else 200, {"error": "exists"} if known else {})

    def info(self, repository, revision="main"):
        if repository not in self.server.repositories:
            return self.missing("Repo")
        if revision not in self.server.repositories[repository]:
            return self.missing("Revision")
        return self.answer(200, {"id": repository, "sha": "0" * 40, "siblings": [], "tags": []})

    def entries(self, repository, revision, folder=None):
        prefix, found = f"{folder}/" if folder else "", {}
        for path, data in self.server.repositories[repository][revision].items():
            if path.startswith(prefix):
                first, slash, _ = path.removeprefix(prefix).partition("/")
                about = {"oid": hashlib.sha1(data).hexdigest(), "path": prefix + first}
                found[first] = about | ({"type": "directory"} if slash else {"type": "file", "size": len(data)})
        if folder and not found:
            return self.missing("Entry")
        return self.answer(200, list(found.values()))

    def preupload(self, repository, revision):
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
        answers = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.answer(200, {"files": answers})

    def batch(self, repository):
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        self.server.large[oid] = self.body
        self.answer(200)

    def commit(self, repository, revision):
        files = self.server.repositories[repository][revision]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append((repository, revision))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.answer(200, {"commitUrl": f"{self.server.url}/{repository}/commit/0", "commitOid": "0" * 40})

    def content(self, repository, revision, path):
        data = self.server.repositories.get(repository, {}).get(revision, {}).get(path)
        if data is None:
            return self.missing("Entry")
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers = {"Content_Range": f"bytes {first}-{last}/{len(data)}"}
            return self.answer(206, data[first : last + 1], ETag=hashlib.sha256(data).hexdigest(), **headers)
        return self.answer(200, data, ETag=hashlib.sha256(data).hexdigest())


NAME, REVISION = r"(?P<repository>[\w-]+/[\w-]+)", r"(?P<revision>[\w.-]+)"
ROUTES = [
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", lambda handler: handler.answer(200, {})),
    (("POST",), f"/api/models/{NAME}/branch/{REVISION}", Handler.branch),
    (("GET",), f"/api/models/{NAME}", Handler.info),
    (("GET",), f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    (("GET",), f"/api/models/{NAME}/tree/{REVISION}(/(?P<folder>.+))?", Handler.entries),
    (("POST",), f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    (("POST",), f"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/large/(?P<oid>[0-9a-f]{64})", Handler.upload),
    (("GET", "HEAD"), f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.content),
]
